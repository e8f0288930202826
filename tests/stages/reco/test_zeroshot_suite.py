"""The fusion of a run is found, also under the name that earlier runs gave its stage."""

import dataclasses
import shutil

import jax
import pytest
from etils import epath
from flax import nnx

from rag_mm.core import files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.models import reco
from rag_mm.stages.reco import refinement, train_fusion, zeroshot_suite
from rag_mm.stages.shared import train_retriever
from rag_mm.train import checkpoint


def write_fusion(towers):
    config = reco.RecoConfig(dim=64, num_heads=4)
    _, params = nnx.split(reco.RECO(config, rngs=nnx.Rngs(0)), nnx.Param)

    def write(run, stage_dir):
        checkpoint.save_params(stage_dir / train_fusion.PARAMS, nnx.to_pure_dict(params))
        record = {
            "model": dataclasses.asdict(config),
            "search": dataclasses.asdict(refinement.SearchSettings()),
            "towers": towers,
        }
        files.write_json(stage_dir / train_fusion.RECORD, record)
        return {}

    return write


@pytest.mark.parametrize("stage", ["fusion", "document_fusion"])
def test_a_stored_run_of_any_version_is_read(tiny_run, tmp_path, stage):
    run = run_folder.Run(epath.Path(tmp_path / "run"))
    run.workdir.mkdir()
    memory = tiny_run.workdir / "memory"
    towers = train_retriever.load_encoder(tiny_run.workdir).fingerprint
    run_folder.run_stage(run, stage, {}, (), write_fusion(towers))
    run.save_config({"stages": [stage], "document_pairs": {"memory": str(memory)}})
    classifier = zeroshot_suite.load(run.workdir)
    rows = zeroshot_suite.class_rows(classifier.encoder, ["red kite"], None)
    refined = classifier.refine("text", rows, "both")
    assert refined.shape == (1, 64) and abs(jax.numpy.linalg.norm(refined) - 1) < 1e-4
    run.save_config({"stages": ["toy_pairs", stage]})
    with pytest.raises(UserError, match="has no memory; name one with --memory"):
        zeroshot_suite.load(run.workdir)
    assert len(zeroshot_suite.load(run.workdir, memory).memory) > 0
    shutil.rmtree(run.stage_dir(stage))
    with pytest.raises(UserError, match="has no trained fusion"):
        zeroshot_suite.load(run.workdir)

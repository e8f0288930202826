"""Whoever uses an old name is told the new one."""

import importlib
import pathlib
import re

import pytest

import configs
from rag_mm.cli import main
from rag_mm.core import configuration, renames
from rag_mm.core.errors import UserError
from rag_mm.perf.plan import cases
from rag_mm.stages import chain_config

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGES = sorted(path.stem for path in pathlib.Path(configs.__file__).parent.glob("[!_]*.py"))


def test_the_page_for_people_lists_every_rename():
    rows = re.findall(r"^\| `(.+)` \| `(.+)` \|$", (ROOT / "docs/renames.md").read_text(), re.M)
    assert dict(rows) == renames.RENAMES


def _settings(page: str) -> set[str]:
    """Dotted keys that some preset of a page has, once filled."""
    found = set()
    for preset in importlib.import_module(f"configs.{page}").PRESETS:
        config = configuration.to_dict(configuration.load_config(f"configs/{page}.py:{preset}"))
        sections = cases.sections if "family" in config else chain_config.sections
        filled = configuration.fill(config, sections)
        found |= {setting.path for setting in configuration.settings(filled, sections)}
    return found


def test_new_names_exist_and_old_ones_do_not():
    settings = set().union(*(_settings(page) for page in PAGES))
    for old, new in renames.RENAMES.items():
        if old.startswith("configs/"):
            assert (ROOT / new).exists() and not (ROOT / old).exists()
        elif not old.startswith("rag-mm "):
            known = {path for path in settings if f"{path}.".startswith(f"{new}.")}
            assert known and old not in settings, old


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("decoder.docs_shares", "decoder.sequences.num_docs_weights"),
        ("retriever.embed_dim", "retriever.model.embed_dim"),
        ("decoder.model.init_std", "decoder.model.init.std"),
        ("tokenizer.imported", "tokenizer.folder"),
        ("toy_fusion.loop.num_steps", "fusion.loop.num_steps"),
        ("document_fusion.curve_rows", "fusion.measures.curve_rows"),
    ],
)
def test_an_override_of_an_old_name_names_the_new_one(old, new):
    with pytest.raises(UserError, match=f"no key '{old}'; it is now called '{new}'"):
        chain_config.load("configs/quickstart.py:tiny", {old: "1"})


def test_a_page_that_uses_an_old_name_is_told_the_new_one(tmp_path):
    page = tmp_path / "mine.py"
    page.write_text(
        "from rag_mm.configs import quickstart\n"
        "PRESETS = ('only',)\n"
        "def get_config(preset):\n"
        "    config = quickstart.tiny()\n"
        "    config['decoder']['masking'] = dict()\n"
        "    config['decoder']['mask_probability'] = 0.5\n"
        "    return config\n"
    )
    with pytest.raises(
        UserError, match="'mask_probability'; it is now called 'decoder.masking.prob'"
    ):
        chain_config.load(str(page))


def test_an_old_stage_is_told_its_new_name():
    page = chain_config.load("configs/reco.py:toy")
    with pytest.raises(UserError, match="no stage 'toy_fusion'; it is now called 'fusion'"):
        chain_config.stage_configs(page | {"stages": ["toy_pairs", "toy_fusion"]})


def test_an_old_page_is_told_its_new_name():
    with pytest.raises(UserError, match="now called 'configs/own_images.py'"):
        chain_config.load("configs/own_pictures.py:tiny")


def test_an_old_option_is_told_its_new_name(capfd):
    assert main.main(["ablate", "--config=x.py", "--workdir=out", "--borrow=run"]) == 2
    assert "now called 'rag-mm ablate --reuse'" in capfd.readouterr().err


def test_files_keep_the_old_names_so_that_fingerprints_stay():
    config = {"family": "clip", "max_text_len": 24, "patch_size": 8}
    stored = renames.to_stored(config)
    assert stored == {"family": "clip", "max_text": 24, "patch_size": 8}
    assert renames.from_stored(stored) == config == renames.from_stored(config)


def test_a_stored_decoder_of_any_version_is_read():
    old = {"decoder": {"num_layers": 2, "init_std": 0.1, "output_init_std": None}, "alpha": 0.1}
    new = {"decoder": {"num_layers": 2, "init": {"std": 0.1, "output_std": None}}, "alpha": 0.1}
    assert renames.from_stored(old) == new == renames.from_stored(new)

"""All scene tasks by name."""

from rag_mm.worlds.emoji import (
    scene_boxes,
    scene_clips,
    scene_edits,
    scene_questions,
    scene_stories,
    scene_structure,
)

TASKS = {
    task.name: task
    for task in (
        scene_questions.WHAT,
        scene_questions.WHERE,
        scene_questions.WHICH_COLOR,
        scene_questions.HOW_MANY,
        scene_edits.RECOLOR,
        scene_edits.MOVE,
        scene_edits.SWAP,
        scene_boxes.DRAW_BOXES,
        scene_boxes.TELL_BOXES,
        scene_structure.SILHOUETTE,
        scene_structure.EDGES,
        scene_structure.FROM_SILHOUETTE,
        scene_structure.FROM_EDGES,
        scene_clips.DRAW_CLIP,
        scene_clips.TELL_CLIP,
        scene_clips.WHICH_WAY,
        scene_stories.STORY,
    )
}

"""What Emu is asked in its evaluation: texts of the public code (Emu1: inference.py, mm_eval/datasets)."""

SYSTEM = (
    "You will be presented with an image: [IMG]ImageContent[/IMG]. You will be able to see the image after I "
    "provide it to you. Please answer my questions based on the given image."
)
# What the user says after the image, and how the answer begins.
CAPTION = "please provide an accurate and concise description of the given image."
CAPTION_STEM = "the image depicts a photo of"
QUESTION = (
    "based on the content of the image and common sense, please provide an accurate answer consisting of "
    "only one word or phrase. {}"
)
QUESTION_STEM = "the answer is:"

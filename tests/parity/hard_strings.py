"""Strings on which tokenizers differ."""

STRINGS = (
    "a photo of a cat",
    "A PHOTO, of a CAT!! 's don't we'll I've",
    "  leading, trailing\tand\n\nmixed   white space \u00a0\u2003 ",
    "",
    " ",
    "1234567890 3.14 x² ½ ٣",
    "naïve café cafe\u0301 ﬁ ＡＢＣ ÅÅ",
    "日本語のテキスト 한국어 עברית العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200d \ufeff",
    "<|startoftext|>inside<|endoftext|> <image> IMGIMGAZ </w>",
    "snake_case CamelCase http://a.b/c?d=e&f=%20",
    "\x00\x01\x7f\ud7ff\ue000\U0010ffff",
    "word " * 100,
)

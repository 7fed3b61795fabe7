"""Lists what each release of Moondream 2 defines only in its code, not in its weights or `config.json`.

The `config.json` on the hub is empty inside (`"config": {}`). Token ids and templates are defaults of the
official code, different in each release. Source: vikhyat/moondream, `moondream/torch/config.py` at the dates
below.
"""

from typing import Any

CODEGEN_ID, STARMIE_ID = 50256, 0
"""Ids of `<|endoftext|>`, which begins and ends every sequence, in the two tokenizers of Moondream 2."""

TOKENIZER_NAMES = {CODEGEN_ID: "CodeGen (GPT-2)", STARMIE_ID: "moondream/starmie-v1"}

_CODEGEN_TEMPLATES = {
    "caption": {
        "short": [198, 198, 16438, 8305, 25],
        "normal": [198, 198, 24334, 1159, 25],
        "long": [198, 198, 14617, 8305, 25],
    },
    "query": {"prefix": [198, 198, 24361, 25], "suffix": [198, 198, 33706, 25]},
    "detect": {"prefix": [198, 198, 47504, 25], "suffix": [628]},
    "point": {"prefix": [198, 198, 12727, 25], "suffix": [628]},
}
_STARMIE_TEMPLATES = {
    "caption": {
        "short": [1, 32708, 2, 12492, 3],
        "normal": [1, 32708, 2, 6382, 3],
        "long": [1, 32708, 2, 4059, 3],
    },
    "query": {"prefix": [1, 15381, 2], "suffix": [3]},
    "detect": {"prefix": [1, 7235, 476, 2], "suffix": [3]},
    "point": {"prefix": [1, 2581, 2], "suffix": [3]},
}
_NO_LONG = {**_CODEGEN_TEMPLATES, "caption": {**_CODEGEN_TEMPLATES["caption"], "long": None}}

REVISIONS: dict[str, dict[str, Any]] = {
    "2024-08-26": {
        "bos_token_id": CODEGEN_ID,
        "templates": _NO_LONG,
        "question_space": True,
        "prefix_attention": False,
        "crops": "fixed",
        "overlap_margin": 0,
        "local_pooling": "bilinear",
    },
    "2025-01-09": {"bos_token_id": CODEGEN_ID, "templates": _NO_LONG, "question_space": False},
    "2025-03-27": {"bos_token_id": CODEGEN_ID, "templates": _CODEGEN_TEMPLATES, "question_space": True},
    "2025-04-14": {"bos_token_id": CODEGEN_ID, "templates": _CODEGEN_TEMPLATES, "question_space": True},
    "2025-06-21": {
        "bos_token_id": STARMIE_ID,
        "templates": _STARMIE_TEMPLATES,
        "answer_token_id": 3,
        "unused_token_ids": {
            "thinking_id": 4,
            "coord_id": 5,
            "size_id": 6,
            "start_ground_points_id": 7,
            "end_ground_id": 9,
        },
    },
}
"""Release → the fields of `MoondreamConfig` in which releases differ."""

RELEASES = tuple(REVISIONS)
REVISIONS["9a7d4024050840e001defacec2b00727e89149e6"] = REVISIONS["2025-06-21"]
DEFAULT_REVISION = "2025-06-21"

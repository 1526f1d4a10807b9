"""MMStar's layout, twice: the hub's Parquet and the evaluation kit's TSV, with the same rows.

    mmstar.parquet   the options stand in the question: "...\\nOptions: A: red, B: blue, C: teal, D: gray"
    MMStar.tsv       the question alone, options in the columns A to D, the picture in base64

Six categories of three sub-categories, six questions each. One question in six has the marker ``<image 1>``, as the
questions that MMStar took from MMMU do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grace_vlm.evals.toy.deck import Deck, Item
from grace_vlm.evals.toy.layout import encode_picture, picture, write_parquet, write_tsv

NAME = "mmstar"
PARQUET_COLUMNS = {
    "index": "int64",
    "question": "string",
    "image": "image",
    "answer": "string",
    "category": "string",
    "l2_category": "string",
    "meta_info": "{source,split,image_path}",
}
TSV_COLUMNS = ("index", "question", "image", "answer", "category", "l2_category", "meta_info", "A", "B", "C", "D")
NUM_PER_SUBCATEGORY = 6
PLAN: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    # category: {sub-category: (room, kind), by turns}
    "coarse perception": {
        "image scene and topic": (("grids", "contents"), ("charts", "contents"), ("diagrams", "contents")),
        "image style & quality": (("patterns", "pattern_name"), ("patterns", "pattern_color")),
        "image emotion": (("faces", "face_mood"),),
    },
    "fine-grained perception": {
        "object counting": (("grids", "scene_count_shape"), ("charts", "chart_count")),
        "recognition": (("grids", "scene_shape_at"), ("digits", "digit_at")),
        "localization": (("grids", "position"), ("grids", "scene_color_at")),
    },
    "instance reasoning": {
        "single-instance reasoning": (("grids", "scene_color_at"),),
        "cross-instance attribute reasoning": (("charts", "chart_max"), ("digits", "digit_max")),
        "cross-instance relation reasoning": (("grids", "direction"), ("grids", "scene_neighbor")),
    },
    "logical reasoning": {
        "code & sequence reasoning": (("sequences", "sequence_shape"), ("sequences", "sequence_color")),
        "diagram reasoning": (("diagrams", "diagram_color"), ("diagrams", "diagram_in")),
        "common reasoning": (("grids", "scene_neighbor"),),
    },
    "math": {
        "geometry": (("polygons", "polygon_corners"),),
        "numeric commonsense and calculation": (("digits", "digit_sum"), ("digits", "digit_count")),
        "statistical reasoning": (("charts", "chart_value"), ("charts", "chart_difference")),
    },
    "science & technology": {
        "biology & chemistry & physics": (("chains", "chain_eater"), ("chains", "chain_eaten")),
        "electronics & energy & mechanical eng.": (("lamps", "lamp_count"),),
        "geography & earth science & agriculture": (("maps", "map_neighbor"), ("flags", "flag_country")),
    },
}


def write(folder: Path, seed: int) -> dict[str, int]:
    """Write both files; returns what is in each."""
    deck = Deck(NAME, seed)
    drawn = [
        (deck.deal(*turns[number % len(turns)], 4), category, subcategory)
        for category, members in PLAN.items()
        for subcategory, turns in members.items()
        for number in range(NUM_PER_SUBCATEGORY)
    ]
    deck.rng("order").shuffle(drawn)
    rows = [_row(index, *parts) for index, parts in enumerate(drawn)]
    items = [item for item, *_ in drawn]
    parquet = [
        {**row, "question": f"{row['question']}\nOptions: {_inline(item)}", "image": picture(item.png)}
        for row, item in zip(rows, items, strict=True)
    ]
    tsv = [
        {
            **row,
            "image": encode_picture(item.png),
            "meta_info": str(row["meta_info"]),
            **dict(zip("ABCD", item.options, strict=True)),
        }
        for row, item in zip(rows, items, strict=True)
    ]
    write_parquet(folder / "mmstar.parquet", PARQUET_COLUMNS, parquet)
    write_tsv(folder / "MMStar.tsv", TSV_COLUMNS, tsv)
    return {"rows": len(rows), "pictures": len(rows)}


def _inline(item: Item) -> str:
    return ", ".join(f"{letter}: {option}" for letter, option in zip("ABCD", item.options, strict=True))


def _row(index: int, item: Item, category: str, subcategory: str) -> dict[str, Any]:
    marker = "<image 1>\n" if index % 6 == 0 else ""
    return {
        "index": index,
        "question": marker + item.question,
        "image": None,
        "answer": item.letter,
        "category": category,
        "l2_category": subcategory,
        "meta_info": {"source": "grace-vlm toy suite", "split": "val", "image_path": f"images/{index}.png"},
    }

"""The true layouts: every row, cell and picture arrives; a column of another name is one line that says so."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
import task_files
from task_files import WRITERS, png

from grace_vlm.errors import ConfigError, DataError
from grace_vlm.evals.tasks.registry import TASKS, task_named
from grace_vlm.evals.tasks.task import PROFILES, Doc, Part, Picture

RENAMED = [(name, column.name) for name, task in TASKS.items() for column in task.about.columns if not column.optional]


def docs_of(name: str, folder: Path) -> dict[str, Doc]:
    return {doc.id: doc for doc in TASKS[name].docs(WRITERS[name](folder))}


def shown(parts: tuple[Part, ...]) -> list[str]:
    """A prompt to compare: text as it is, pictures by column in angle brackets."""
    return [f"<{part.column}>" if isinstance(part, Picture) else part for part in parts]


@pytest.mark.parametrize(("name", "column"), RENAMED)
def test_a_renamed_column_is_named(tmp_path: Path, name: str, column: str) -> None:
    folder = WRITERS[name](tmp_path / "set", rename=(column, f"{column}_new"))
    with pytest.raises(DataError) as caught:
        TASKS[name].docs(folder)
    text = str(caught.value)
    assert f"has no column {column!r}, which {TASKS[name].about.title} needs; its columns are " in text
    assert f"{column}_new" in text
    assert str(folder) in text
    assert "\n" not in text


def test_every_task_has_a_fixture_and_every_question_its_picture_bytes(tmp_path: Path) -> None:
    assert set(WRITERS) == set(TASKS)
    for name in TASKS:
        for doc in docs_of(name, tmp_path / name).values():
            assert all(picture.load()[1:4] == b"PNG" for picture in doc.images)
            assert all(TASKS[name].prompt(doc, profile) for profile in TASKS[name].about.profiles)


@pytest.mark.parametrize("name", TASKS)
def test_every_profile_asks_with_a_budget(tmp_path: Path, name: str) -> None:
    doc = next(iter(docs_of(name, tmp_path / "set").values()))
    for profile in TASKS[name].about.profiles:
        assert TASKS[name].max_new_tokens(doc, profile) >= 8


def test_profiles_that_are_not_there() -> None:
    doc = Doc("1", 0, "yes_no", "?", "yes")
    expected = r"hallusion has no profile 'lmms'; choose one of card, kit, strict"
    with pytest.raises(ConfigError, match=expected):
        task_named("hallusion").prompt(doc, "lmms")
    with pytest.raises(ConfigError, match="there is no task 'mmbenc'; choose one of hallusion, mmbench, "):
        task_named("mmbenc")
    assert TASKS["mmbench"].about.profiles == PROFILES


def test_hallusion_bench(tmp_path: Path) -> None:
    task, docs = TASKS["hallusion"], docs_of("hallusion", tmp_path)
    assert list(docs) == [
        *("VD/figure/0/0/0", "VD/figure/0/0/1", "VD/figure/0/1/0", "VD/figure/0/1/1", "VS/chart/0/1/0"),
        *("VS/chart/0/2/0", "VS/chart/0/0/0/text"),
    ]
    assert [doc.gold for doc in docs.values()] == ["yes", "no", "no", "yes", "yes", "no", "yes"]
    asked = "Is figure 0 red?\nAnswer with only 'Yes' or 'No'."
    assert shown(task.prompt(docs["VD/figure/0/0/0"], "card")) == ["<image>", asked]
    assert shown(task.prompt(docs["VS/chart/0/0/0/text"], "strict")) == [asked]
    assert shown(task.prompt(docs["VD/figure/0/0/0"], "kit")) == ["<image>", "Is figure 0 red?"]
    assert task.groups(docs["VS/chart/0/0/0/text"]) == {
        "population": "text",
        "category": "VS",
        "subcategory": "VS/chart",
        "set": "VS/chart/0",
        "figure": "VS/chart/0/0",
        "question": "VS/chart/0/0",
    }


def test_a_figure_without_its_picture_is_an_error(tmp_path: Path) -> None:
    folder = task_files.hallusion(tmp_path)
    data = folder / "data"
    shutil.copy(data / "non_image-00000-of-00001.parquet", data / "image-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"row 0 of .*image-00000-of-00001.parquet has None in the column 'image'"):
        TASKS["hallusion"].docs(folder)


def test_mmbench(tmp_path: Path) -> None:
    task, docs = TASKS["mmbench"], docs_of("mmbench", tmp_path)
    assert list(docs) == ["1", "2", "1000001", "1000002"]
    assert docs["1"].options == {"A": "cat", "B": "None", "C": "5 &lt; 6", "D": "dog"}
    assert docs["2"].options == {"A": "yes", "B": "no"}
    assert [docs[index].hint for index in docs] == [None, "Look\nat it", None, "Look\nat it"]
    assert docs["1000002"].images[0].load() == png("blue")
    assert task.groups(docs["1000002"]) == {
        "circular": "2",
        "rotation": "1",
        "category": "colour",
        "l2-category": "perception",
    }
    assert shown(task.prompt(docs["2"], "card")) == [
        "<image>",
        "Context: Look\nat it\nQuestion: Is it blue?\nOptions:\n(A) yes\n(B) no\nAnswer with only the option letter.",
    ]
    assert shown(task.prompt(docs["2"], "lmms"))[1] == (
        "Look\nat it Is it blue? There are several options:\nA. yes\nB. no\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert shown(task.prompt(docs["1"], "kit"))[1] == (
        "Question: What is it?\nOptions:\nA. cat\nB. None\nC. 5 &lt; 6\nD. dog\n"
        "Please select the correct answer from the options above. \n"
    )
    assert shown(task.prompt(docs["2"], "kit"))[1].startswith("Hint: Look\nat it\nQuestion: Is it blue?\nOptions:\n")


def test_lmms_eval_strips_the_end_of_mmbench_options() -> None:
    doc = Doc("1", 0, "choice", "Which?", "A", options={"A": "x\n", "B": "y \n\n"})
    (text,) = TASKS["mmbench"].prompt(doc, "lmms")
    assert text == (
        "Which? There are several options:\nA. x\n\nB. y \n\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_rotations_of_mmbench() -> None:
    doc = Doc("3001234", 0, "choice", "?", "A", columns={"category": "c"})
    assert TASKS["mmbench"].groups(doc) == {"circular": "1234", "rotation": "3", "category": "c"}


def test_mmbench_is_any_single_tsv_and_the_file_itself(tmp_path: Path) -> None:
    file = task_files.mmbench(tmp_path) / "mmbench_dev_en_20231003.tsv"
    assert len(TASKS["mmbench"].docs(file)) == 4
    other = file.rename(tmp_path / "toy.tsv")
    assert len(TASKS["mmbench"].docs(str(tmp_path))) == 4
    shutil.copy(other, tmp_path / "second.tsv")
    with pytest.raises(DataError, match=r"has 2 \.tsv files; expected one: give the file itself"):
        TASKS["mmbench"].docs(tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("answer", "C", r"row 1 of .* has 'C' in the column 'answer'; expected one of the letters A, B: "),
        ("B", "", r"row 1 of .* has 1 options; expected 2 to 10: "),
        ("index", "two", r"has 'two' in the column 'index'; expected a whole number: "),
        ("index", "1", r"row 1 has the id '1' of an earlier row"),
        ("index", "3", r"has row 1000002 but not 2, the question whose rotation it is"),
        ("image", "99", r"has '99' in the column 'image'; expected a picture, or the index of an earlier row"),
        ("image", "", r"has '' in the column 'image'; expected a picture: bytes, "),
        ("question", "nan", r"has 'nan' in the column 'question'; expected text or a number: "),
    ],
)
def test_mmbench_rows_that_cannot_be_scored(tmp_path: Path, column: str, value: str, reason: str) -> None:
    file = task_files.mmbench(tmp_path) / "mmbench_dev_en_20231003.tsv"
    names, rows = task_files.MMBENCH_NAMES, []
    for doc in TASKS["mmbench"].docs(file):
        cells = [doc.options.get(letter, "") for letter in "ABCD"]
        image = base64.b64encode(doc.images[0].load()).decode()
        rows.append([doc.id, doc.question, doc.hint or "", *cells, doc.gold, "c", "l", "s", "dev", image])
    task_files.write_tsv(file, names, rows)
    assert len(TASKS["mmbench"].docs(file)) == 4
    rows[1][names.index(column)] = value
    task_files.write_tsv(file, names, rows)
    with pytest.raises(DataError, match=reason):
        TASKS["mmbench"].docs(file)


def test_scienceqa(tmp_path: Path) -> None:
    task, docs = TASKS["scienceqa"], docs_of("scienceqa", tmp_path)
    assert list(docs) == ["7", "8", "9"]
    assert [doc.gold for doc in docs.values()] == ["B", "A", "E"]
    assert docs["9"].options == {"A": "1", "B": "2", "C": "3", "D": "4", "E": "5"}
    assert [len(doc.images) for doc in docs.values()] == [1, 0, 0]
    assert docs["7"].images[0].load() == png("green")
    assert shown(task.prompt(docs["7"], "strict")) == [
        "<image>",
        "Context: Look &amp; see.\nQuestion: Which?\nOptions:\n(A) an owl\n(B) a bat\n"
        "Answer with only the option letter.",
    ]
    ending = "Answer with the option's letter from the given choices directly."
    assert shown(task.prompt(docs["8"], "lmms")) == [f"Which?\nA. x\nB. y\nC. z\n{ending}"]
    assert shown(task.prompt(docs["7"], "lmms"))[1] == (
        f"Context: Look &amp; see. \nWhich?\nA. an owl\nB. a bat\n{ending}"
    )
    assert task.groups(docs["8"]) == {
        "population": "text",
        "subject": "social science",
        "topic": "biology",
        "grade": "grade2",
    }


def test_scienceqa_never_asks_without_its_picture(tmp_path: Path) -> None:
    folder = task_files.scienceqa(tmp_path)
    (folder / "images" / "test" / "7" / "image.png").unlink()
    with pytest.raises(DataError, match=r"names the picture 'image.png' in .*, which is no file there: fetch"):
        TASKS["scienceqa"].docs(folder)
    problems = json.loads((folder / "problems.json").read_text())
    problems["7"]["image"] = "../../../../secret.png"
    (tmp_path.parent / "secret.png").write_bytes(png("red"))
    (folder / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(DataError, match="which leaves that folder"):
        TASKS["scienceqa"].docs(folder)


def test_scienceqa_splits_that_do_not_fit(tmp_path: Path) -> None:
    folder = task_files.scienceqa(tmp_path)
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["7", "70"]}))
    with pytest.raises(DataError, match=r"problems.json has no problem 70, which pid_splits.json names"):
        TASKS["scienceqa"].docs(folder)
    (folder / "pid_splits.json").write_text("{}")
    with pytest.raises(DataError, match="has no list 'test'"):
        TASKS["scienceqa"].docs(folder)


def test_other_layouts_of_the_same_rows(tmp_path: Path) -> None:
    """lmms-lab's Parquet of ScienceQA and MMBench, which writes L2-category; a text table without an image column."""
    text, integer, texts = task_files.pa.string(), task_files.pa.int64(), task_files.pa.list_(task_files.pa.string())
    picture = {"image": task_files.PICTURE}
    school = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "", "image": task_files.cell("red")}
    plain = ("grade", "subject", "topic", "category", "lecture", "solution")
    types = {
        "question": text,
        "choices": texts,
        "answer": integer,
        "hint": text,
        **dict.fromkeys(plain, text),
        **picture,
    }
    rows = [school, school | {"image": None, "hint": "Look."}]
    task_files.write_parquet(tmp_path / "ScienceQA-FULL" / "test-00000-of-00001.parquet", rows, types)
    docs = TASKS["scienceqa"].docs(tmp_path).docs
    assert [(doc.gold, doc.hint, len(doc.images)) for doc in docs] == [("B", None, 1), ("B", "Look.", 0)]

    bench = {"index": 5, "question": "?", "hint": "nan", "A": "x", "B": "y", "C": "nan", "D": "nan", "answer": "B"}
    bench |= {"category": "c", "L2-category": "l", "image": task_files.cell("red")}
    types = dict.fromkeys(("question", "hint", *"ABCD", "answer", "category", "L2-category"), text)
    task_files.write_parquet(tmp_path / "en" / "dev-0.parquet", [bench], {"index": integer, **types, **picture})
    (doc,) = TASKS["mmbench"].docs(tmp_path)
    assert (doc.hint, doc.options, doc.columns["l2-category"]) == (None, {"A": "x", "B": "y"}, "l")

    folder = task_files.hallusion(tmp_path / "hallusion")
    file = folder / "data" / "non_image-00000-of-00001.parquet"
    task_files.pq.write_table(task_files.pq.read_table(file).drop_columns(["image"]), file)
    assert len(TASKS["hallusion"].docs(folder)) == 7


def test_strict_asks_as_the_card_does_but_where_the_card_loses_pictures(tmp_path: Path) -> None:
    """So that one reply serves both."""
    for name in ("hallusion", "mmbench", "scienceqa", "ai2d", "seed", "mmstar"):
        for doc in docs_of(name, tmp_path / name).values():
            assert TASKS[name].prompt(doc, "card") == TASKS[name].prompt(doc, "strict")


def test_ai2d(tmp_path: Path) -> None:
    task, docs = TASKS["ai2d"], docs_of("ai2d", tmp_path)
    assert [doc.gold for doc in docs.values()] == ["C", "A", "D"]
    assert docs["0"].options == {"A": "A", "B": "C", "C": "E", "D": "F"}
    diagrams = [task.groups(doc)["diagram"] for doc in docs.values()]
    assert diagrams[0] == diagrams[1] != diagrams[2]
    assert shown(task.prompt(docs["1"], "card"))[1].startswith("Question: What is A?\nOptions:\n(A) leaf\n(B) root\n")
    assert shown(task.prompt(docs["1"], "lmms"))[1].startswith("What is A?\nA. leaf\nB. root\nC. stem\nD. soil\nAnswer")


@pytest.mark.parametrize(("answer", "expected"), [("4", "0 to 3"), ("-1", "0 to 3"), ("E", "A, B, C, D")])
def test_a_gold_answer_that_is_no_option(tmp_path: Path, answer: str, expected: str) -> None:
    file = task_files.ai2d(tmp_path) / "data" / "test-00000-of-00001.parquet"
    table = task_files.pq.read_table(file)
    rows = [row | {"answer": answer} for row in table.to_pylist()]
    task_files.pq.write_table(task_files.pa.Table.from_pylist(rows, table.schema), file)
    with pytest.raises(
        DataError, match=rf"row 0 of .* in the column 'answer'; expected .*{expected}: correct the file"
    ):
        TASKS["ai2d"].docs(tmp_path)


def test_masked_and_unmasked_diagrams_are_kept_apart(tmp_path: Path) -> None:
    file = task_files.ai2d(tmp_path) / "data" / "test-00000-of-00001.parquet"
    rows = [{"question": "?", "options": ["x", "y"], "answer": "1", "image": task_files.cell("red")}]
    types = {"question": "string", "answer": "string", "image": task_files.PICTURE}
    types["options"] = task_files.pa.list_(task_files.pa.string())
    task_files.write_parquet(file.with_name("test_no_mask-00000-of-00001.parquet"), rows, types)
    assert len(TASKS["ai2d"].docs(tmp_path)) == 3
    assert len(TASKS["ai2d_no_mask"].docs(tmp_path)) == 1


def test_mmmu(tmp_path: Path) -> None:
    task, docs = TASKS["mmmu"], docs_of("mmmu", tmp_path)
    assert list(docs) == [*(f"validation_Art_{n}" for n in (1, 2)), *(f"validation_Math_{n}" for n in (1, 2, 3))]
    two, options = docs["validation_Art_1"], docs["validation_Art_2"]
    assert two.options == {"A": "the first", "B": "<image 1> &amp; it", "C": "the second's"}
    assert [picture.column for picture in options.images] == ["image_1", "image_2", "image_3"]
    assert options.images[2].load() == png("green")
    assert task.groups(two) == {"question_type": "choice", "subject": "Art", "discipline": "Art and Design"}
    assert docs["validation_Math_2"].gold == "['8.4', '8.4 V']"
    # The card drops the pictures of options, and leaves the question's tags as a word.
    assert shown(task.prompt(options, "card")) == [
        "<image_1>",
        "Question: Which fits <image>?\nOptions:\n(A) <image 2>\n(B) <image 3>\nAnswer with only the option letter.",
    ]
    assert shown(task.prompt(options, "strict")) == [
        *("Question: Which fits ", "<image_1>", "?\nOptions:\n(A) ", "<image_2>", "\n(B) ", "<image_3>"),
        "\nAnswer with only the option letter.",
    ]
    assert shown(task.prompt(options, "kit")) == [
        *("Question: Which fits ", "<image_1>", "?\nOptions:\nA. ", "<image_2>", "\nB. ", "<image_3>"),
        "\nPlease select the correct answer from the options above. \n",
    ]
    ending = "Answer with the option's letter from the given choices directly."
    assert shown(task.prompt(options, "lmms")) == [
        *("Which fits", "<image_1>", "?\nA.", "<image_2>", "B.", "<image_3>", ending),
    ]
    # Three tags, two pictures: lmms-eval loses the words between.
    assert shown(task.prompt(two, "lmms")) == [
        *("Which is older,", "<image_1>", "or", "<image_2>", f"&amp; it\nC. the second's\n\n{ending}"),
    ]
    opened = docs["validation_Math_1"]
    assert shown(task.prompt(opened, "card")) == [
        "<image_1>",
        "<image> Sum?\nAnswer with a short phrase or number only.",
    ]
    assert shown(task.prompt(opened, "strict")) == ["<image_1>", " Sum?\nAnswer with a short phrase or number only."]
    assert shown(task.prompt(opened, "kit")) == ["Question: ", "<image_1>", " Sum?\n"]
    assert [task.max_new_tokens(doc, "card") for doc in docs.values()] == [8, 8, 32, 32, 32]


def test_pictures_that_no_tag_names() -> None:
    """First for strict; kit leaves them out where another is named."""
    pictures = tuple(Picture(f"image_{number}", "here", lambda: b"") for number in (1, 2))
    doc = Doc("validation_Art_9", 0, "open", "<image 2>?", "x", pictures)
    ending = "?\nAnswer with a short phrase or number only."
    assert shown(TASKS["mmmu"].prompt(doc, "strict")) == ["<image_1>", "<image_2>", ending]
    assert shown(TASKS["mmmu"].prompt(doc, "kit")) == ["Question: ", "<image_2>", "?\n"]
    unnamed = Doc("validation_Art_9", 0, "open", "What?", "x", pictures)
    assert shown(TASKS["mmmu"].prompt(unnamed, "kit")) == ["<image_1>", "<image_2>", "Question: What?\n"]
    # The card takes image_1 where the question names none.
    assert shown(TASKS["mmmu"].prompt(unnamed, "card"))[0] == "<image_1>"


def test_a_tag_without_a_picture_is_an_error(tmp_path: Path) -> None:
    rows = [
        {"id": "validation_Art_1", "question": "Which is <image 2>?", "options": "['x', 'y']", "answer": "A"}
        | {"question_type": "multiple-choice", "image_1": task_files.cell("red")}
    ]
    columns = TASKS["mmmu"].about.columns
    types = {c.name: task_files.PICTURE if c.type == "picture" else task_files.pa.string() for c in columns}
    task_files.write_parquet(tmp_path / "Art" / "validation-00000-of-00001.parquet", rows, types)
    with pytest.raises(DataError, match="'image_2'; expected the picture that the question names as <image 2>"):
        TASKS["mmmu"].docs(tmp_path)


def test_seed_bench_skips_videos_and_says_so(tmp_path: Path) -> None:
    docs = TASKS["seed"].docs(task_files.seed(tmp_path))
    assert [doc.id for doc in docs] == ["1", "3", "4"]
    assert docs.skipped == {"video": 2}
    assert [doc.gold for doc in docs] == ["B", "D", "A"]
    assert docs.docs[2].images[0].load() == png("blue")
    assert TASKS["seed"].groups(docs.docs[1]) == {"picture": "1_2.jpg", "question_type": "Instances Counting"}
    (tmp_path / "SEED-Bench-image" / "77.png").unlink()
    with pytest.raises(DataError, match=r"names the picture '77' in .*SEED-Bench-image, which is no file there"):
        TASKS["seed"].docs(tmp_path)
    shutil.rmtree(tmp_path / "SEED-Bench-image")
    with pytest.raises(DataError, match=r"is no folder; unpack SEED-Bench-image.zip beside SEED-Bench.json"):
        TASKS["seed"].docs(tmp_path)


def test_mmstar_in_both_layouts(tmp_path: Path) -> None:
    task = TASKS["mmstar"]
    parquet, tsv = task.docs(task_files.mmstar(tmp_path / "a")), task.docs(task_files.mmstar_tsv(tmp_path / "b"))
    for docs in (parquet, tsv):
        assert [(doc.id, doc.gold) for doc in docs] == [("0", "A"), ("1", "B"), ("2", "C"), ("3", "D")]
    question = "<image 1>\nWhich? Options: A: cat, B: dog, C: a green cone, D: sun"
    assert shown(task.prompt(parquet.docs[0], "card"))[1] == (
        f"{question}\n\nAnswer with only the option letter (A, B, C, or D)."
    )
    assert shown(task.prompt(tsv.docs[0], "card"))[1] == (
        "Question: Which?\nOptions:\n(A) cat\n(B) dog\n(C) a green cone\n(D) sun\nAnswer with only the option letter."
    )
    assert shown(task.prompt(parquet.docs[0], "lmms"))[1] == (
        question + "\nAnswer with the option's letter from the given choices directly"
    )
    assert shown(task.prompt(parquet.docs[0], "kit"))[1] == f"Question: {question}\n"
    task_files.mmstar_tsv(tmp_path / "a")
    assert task.docs(tmp_path / "a").docs[0].options["C"] == "a green cone"
    # Without columns of options no rule may take "" for an option's text.
    for profile in PROFILES:
        assert task.extract("a green cone?!", parquet.docs[0], profile).status == (
            "ok" if profile == "card" else "unparsed"
        )


def test_mmstar_of_the_tsv_lists_its_options_for_lmms(tmp_path: Path) -> None:
    """lmms-eval reads the Parquet, whose questions have them."""
    task = TASKS["mmstar"]
    doc = next(iter(task.docs(task_files.mmstar_tsv(tmp_path))))
    text = "".join(part for part in task.prompt(doc, "lmms") if isinstance(part, str))
    listed = ", ".join(f"{letter}: {option.strip()}" for letter, option in doc.options.items() if option)
    assert text.count("\nOptions: " + listed + "\n") == 1

"""Job files: what is wrong in one is said, by file, key and value, before any work."""

from pathlib import Path

import pytest

from pipelines import cli, job
from schemas.job import Limits
from tests.corpora import pairs, write_tar

GOOD = """
output = "out"
[embed]
input = ["shards/*.tar", "more/{0..1}.tar"]
model = "fusion-demo"
max-pixels = 1_000_000
quiet = false
beam = ["--direct_num_workers=1"]
[fuse]
fuser = "concat"
weights = true
[[index]]
target-recall = 0.9
[[index]]
name = "both"
column = "fused_embedding"
[evaluate]
queries = 50
[alerts]
max-dead-letters = "1%"
max-row-drop = 10
max-similarity-shift = 0.02
[publish]
keep = 5
"""


def write(folder: Path, text: str = GOOD) -> str:
    (folder / "job.toml").write_text(text)
    return str(folder / "job.toml")


def test_a_job_file_says_what_the_commands_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec, data = job.read(write(tmp_path))
    assert data.decode() == GOOD and spec.output == str(tmp_path / "out")
    assert spec.embed == (
        "--input=shards/*.tar", "--input=more/{0..1}.tar", "--model=fusion-demo", "--max-pixels=1000000",
        "--direct_num_workers=1",
    )  # fmt: skip
    assert spec.fuse == ("--fuser=concat", "--weights") and spec.evaluate == ("--queries=50",)
    assert [(step.name, step.options) for step in spec.indexes] == [
        ("image_embedding", ("--target-recall=0.9",)),
        ("both", ("--column=fused_embedding",)),
    ]
    assert spec.limits == Limits((1.0, True), None, (10.0, False), 0.02)
    assert spec.keep == 5


MINIMAL = 'output = "out"\n[embed]\ninput = "shards/*.tar"\nmodel = "fusion-demo"\n[[index]]\n'


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("output", "ouput", r"no key or section 'ouput': did you mean 'output'\?"),
        ('output = "out"', "", r'output = "…" must say at the top'),
        ('output = "out"', "output = 7", r'output = "…" must say at the top'),
        ('output = "out"', 'output = "s3://key:secret@bucket/x"', "must not hold credentials"),
        ("[embed]", "[embed", "is not TOML: .*line 2"),
        ("[embed]", "[embde]", r"no key or section 'embde': did you mean 'embed'\?"),
        ("[[index]]", "", r"a section \[\[index\]\], with two brackets"),
        ("[[index]]", "[index]", r"a section \[\[index\]\], with two brackets"),
        ("[[index]]", "[[index]]\n[[index]]", "two .* are named 'image_embedding'"),
        ("[[index]]", '[[index]]\nname = "a/b"', r'name = "a/b": it becomes a folder'),
        ("[[index]]", '[[index]]\ncolumn = "caption"', r'column = "caption": it must be one of image_embedding'),
        ("[[index]]", '[[index]]\ncolumn = "fused_embedding"', r"add `fuser` to a section \[fuse\]"),
        ("[[index]]", "[[index]]\ntarget-recall = 2", r"\[\[index\]\] target-recall = 2: 2 is not above 0"),
        ("[[index]]", "[[index]]\ntarget_recall = 0.9", r"no key 'target_recall': did you mean 'target-recall'\?"),
        ("[[index]]", '[[index]]\ntable = "x"', r"has no key 'table'"),
        ("[[index]]", '[[index]]\noutput = "x"', r"output = \"x\": not here: an index lies at OUTPUT/indexes/NAME"),
        ("[[index]]", '[[index]]\nkeep = "nowhere"', r'keep = "nowhere": there are no duplicates'),
        ("model", 'mode = "x"\nmodel', r"\[embed\] has no key 'mode': did you mean 'model'\?"),
        ("model", "help = true\nmodel", "has no key 'help'"),
        ('model = "fusion-demo"', "", r"\[embed\] the following arguments are required: model"),
        ('model = "fusion-demo"', "model = true", r"\[embed\] model = true: expected one argument"),
        ('model = "fusion-demo"', "model = false", r"\[embed\] model = false: expected one argument"),
        ('model = "fusion-demo"', 'model = ["a", "b"]', r'model = \["a", "b"\]: one value, not a list'),
        ('model = "fusion-demo"', 'model = "./nowhere"', r'model = "./nowhere": there is no such file'),
        ("model", 'quiet = "yes"\nmodel', r'quiet = "yes": it must be true or false'),
        ("model", "batch = 2026-01-01\nmodel", r"batch = .*: it must be a text, a number"),
        ("model", "batch = 1.5\nmodel", r"batch = 1.5: invalid positive value"),
        ("model", "num-shards = 2\nmodel", r"num-shards = 2: not here: a job is one launcher"),
        ("model", 'max-dead-letters = "1%"\nmodel', r"write it below \[alerts\]"),
        ("model", 'beam = "--runner=x"\nmodel', r"it must be a list of options"),
        ("model", 'fuser = "nowhere"\nmodel', r'\[embed\] fuser = "nowhere": it is none of weighted_sum'),
        ("model", 'pretrained = "/nowhere.pt"\nmodel', r'pretrained = "/nowhere.pt": there is no such file'),
        ('"shards/*.tar"', '"nowhere/*.tar"', r"\[embed\] input = .*nowhere"),
        ("[[index]]", '[[index]]\n[fuse]\nfuser = "shards"', r'\[fuse\] fuser = "shards": it is none of'),
        ("[[index]]", "[[index]]\n[fuse]", r"\[fuse\] has nothing to do: name a `fuser`"),
        ("[[index]]", '[[index]]\n[evaluate]\nlabels = "x"', r"labels = \"x\": not here: for a table"),
        ("[[index]]", "[[index]]\n[evaluate]\nqueries = 0", r"queries = 0: 0 is not at least 1"),
        ("[[index]]", "[[index]]\n[alerts]\nmax-dead = 1", r"no key 'max-dead': did you mean 'max-dead-letters'\?"),
        ("[[index]]", '[[index]]\n[alerts]\nmax-row-drop = "x%"', r'max-row-drop = "x%": .* neither a number'),
        ("[[index]]", "[[index]]\n[alerts]\nmax-recall-drop = 3", r"max-recall-drop = 3: 3 is not between 0 and 1"),
        (
            "[[index]]",
            '[[index]]\n[alerts]\nmax-recall-drop = "1%"',
            r'max-recall-drop = "1%": 1% is not between 0 and 1',
        ),
        ("[[index]]", "[[index]]\n[alerts]\nmin-recall = nan", r"min-recall = NaN: nan is not between 0 and 1"),
        ("[[index]]", "[[index]]\n[publish]\nkeep = 0", r"\[publish\] keep = 0: 0 is not at least 1"),
        ("[embed]", "alerts = 3\n[embed]", r"alerts = 3: it must be a section"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, said: str
) -> None:
    import re

    write_tar(tmp_path / "shards" / "0.tar", pairs(1))
    path = write(tmp_path, MINIMAL.replace(before, after, 1))
    assert cli.main(["run", path]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert "secret" not in error
    assert path in error or "credentials" in said
    assert not (tmp_path / "out").exists()


def test_a_job_does_not_write_among_a_tables_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "shards" / "0.tar", pairs(1))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.json").write_text("{}")
    assert cli.main(["run", write(tmp_path, MINIMAL)]) == 2
    assert 'out" is a feature table: name a folder for the job' in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["table.json"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(tmp_path / "no.toml")]) == 2
    assert "no.toml" in capsys.readouterr().err


def test_a_trained_fusers_folder_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "shards" / "0.tar", pairs(1))
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate" / "fuser.json").write_text("{}")  # what is in it is for the command to say
    path = write(tmp_path, MINIMAL + '[fuse]\nfuser = "gate"\n')
    job.check_places(path, job.read(path)[0])

"""Tables, shards and indexes on an S3-compatible store: a real server process, reached over the network."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from torch.utils.data import DataLoader

from fusion_core import dedup, files, index, lock, manifest, search, table, towers, verify, versions
from fusion_core.feed import Feed
from pipelines import cli, schedule
from tests.corpora import assert_same_rows, pairs, photo, write_tar

KEY, SECRET = "AKIAFUSIONTEST00KEY", "f1/s3cr3t+0f+th3/test"
INSIDE = "f1/s3cr3t"  # what must not be found anywhere
BROKEN = "000033"  # its picture


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the store, which the environment names, with an empty bucket `corpus`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("store") / "requests.log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out, pytest.MonkeyPatch.context() as patch:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 120
            while not _answers(port):
                assert process.poll() is None, f"the store did not start: {log.read_text()}"
                assert time.monotonic() < deadline, "the store does not answer"
                time.sleep(0.05)
            for name, value in {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }.items():
                patch.setenv(name, value)
            files._store.cache_clear()  # clients of another store
            urllib.request.urlopen(urllib.request.Request(f"{url}/corpus", method="PUT")).close()
            yield url
        finally:
            process.terminate()
            process.wait()
            files._store.cache_clear()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex(("127.0.0.1", port)) == 0


def put(name: str, data: bytes) -> None:
    filesystem, path = files.resolve(f"s3://corpus/{name}")
    with filesystem.open_output_stream(path) as sink:
        sink.write(data)


def shards(folder: Path, n: int = 4, each: int = 12) -> list[Path]:
    paths = []
    for i in range(n):
        members = pairs(each, start=i * each)
        broken = [(name, data[:200] if name == f"{BROKEN}.jpg" else data) for name, data in members]
        paths.append(write_tar(folder / f"shards-{i:03d}.tar", broken))
    return paths


def rows(place: str) -> pa.Table:
    return pa.Table.from_batches(table.Table.open(place).scan())


def objects(bucket: str = "corpus") -> dict[str, bytes]:
    filesystem, root = files.resolve(f"s3://{bucket}")
    found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    return {
        info.path: filesystem.open_input_file(info.path).read() for info in found if info.type == pafs.FileType.File
    }


@pytest.fixture(scope="module")
def store(server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards on the store and here (the returned folder), and a table of the first, here and there."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in shards(folder / "shards"):
        put(f"shards/{path.name}", path.read_bytes())
    return folder


def embed(source: str, output: str, *options: str) -> int:
    command = ["embed", "--input", source, "--output", output, "--model", towers.DEMO, "--device", "cpu", "--quiet"]
    return cli.main([*command, "--workers", "1", *options])


def test_the_whole_way(store: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    there, here = "s3://corpus/work/table", str(store / "table")
    assert embed(f"{store}/shards/shards-{{000..003}}.tar", here) == 0
    assert embed("s3://corpus/shards/shards-{000..003}.tar", there) == 0
    assert embed("s3://corpus/shards/*.tar", there) == 0
    said = capsys.readouterr().out
    assert "48 samples = 47 rows + 1 dead letters" in said and "0 units done, 4 stood already" in said
    theirs, ours = rows(there), rows(here)
    assert set(theirs["shard"].to_pylist()) == {f"s3://corpus/shards/shards-{i:03d}.tar" for i in range(4)}
    assert_same_rows(theirs.drop(["shard"]), ours.drop(["shard"]))

    assert cli.main(["status", there, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 47
    assert cli.main(["verify", there]) == 0

    whole = shards_whole(store)
    put("shards/shards-002.tar", whole)
    assert cli.main(["retry", there, "--quiet", "--workers", "1"]) == 0
    assert "48 samples = 48 rows + 0 dead letters" in capsys.readouterr().out
    assert cli.main(["verify", there]) == 0

    assert cli.main(["index", there, "--output", "s3://corpus/work/index", "--workers", "1"]) == 0
    query = tmp_path / "query.jpg"
    query.write_bytes(photo(7))
    capsys.readouterr()
    assert cli.main(["search", "s3://corpus/work/index", "--image", str(query), "-k", "1", "--json"]) == 0
    hit = json.loads(capsys.readouterr().out)
    assert (hit["key"], hit["shard"]) == ("000007", "s3://corpus/shards/shards-000.tar")
    found = index.Index.open("s3://corpus/work/index")
    row = found.meta([7]).to_pylist()[0]
    assert search.fetch_image(row) == photo(7)  # how the server answers /image

    assert cli.main(["dedup", there, "--output", "s3://corpus/work/dedup"]) == 0
    assert dedup.Duplicates.open("s3://corpus/work/dedup", table.Table.open(there)).kept().all()


def test_a_job_publishes_on_the_store(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "apart", lambda argv, quiet: schedule.Ended(cli.main(argv), 0.0))
    job = tmp_path / "job.toml"
    for number, pattern in enumerate(("000", "{000..001}", "{000..001}")):
        embedding = f'input = "s3://corpus/shards/shards-{pattern}.tar"\nmodel = "fusion-demo"\nworkers = 1\n'
        embedding += 'device = "cpu"\nquiet = true\n'
        job.write_text(f'output = "s3://corpus/job"\n[embed]\n{embedding}[[index]]\nname = "pictures"\n')
        assert cli.main(["run", str(job)]) == 0
        found = schedule.latest("s3://corpus/job")
        assert found and found.state == ("published", "published", "unchanged")[number]
    opened = index.Index.open("s3://corpus/job/indexes/pictures")
    known = versions.read("s3://corpus/job/indexes/pictures")
    assert opened.record.rows_indexed == 24 and known and len(known.versions) == 2
    older = index.Index.open(f"s3://corpus/job/indexes/pictures/{known.versions[1].id}")
    assert older.record.rows_indexed == 12
    with lock.held("s3://corpus/job", "other"):
        assert cli.main(["run", str(job)]) == 5
    versions.discard(older.place)
    assert not [name for name in objects() if known.versions[1].id in name and "/indexes/" in name]
    assert not [name for name in objects() if name.startswith("corpus/job/lock/") and name.endswith(".json")]


def shards_whole(store: Path) -> bytes:
    """The shard with the broken picture, repaired."""
    return write_tar(store / "repaired.tar", pairs(12, start=24)).read_bytes()


def test_it_feeds_training_and_moves_to_clip_retrieval_and_back(store: Path) -> None:
    there, here = "s3://corpus/feed/table", str(store / "feed")
    assert embed("s3://corpus/shards/shards-00{0,1,3}.tar", there) == 0
    assert embed(f"{store}/shards/shards-00{{0,1,3}}.tar", here) == 0

    def feed(place: str) -> Feed:
        return table.Table.open(place).torch(["id", "image_embedding", "caption"], seed=3, batch_rows=5, buffer_rows=10)

    walk, local = iter(feed(there)), list(feed(here))
    first = list(itertools.islice(walk, 3))
    resumed = feed(there)
    resumed.load_state_dict(feed(there).state_dict(3))
    for found, expected in zip([*first, *resumed], local, strict=True):
        assert found["id"].tolist() == expected["id"].tolist() and found["caption"] == expected["caption"]
        np.testing.assert_allclose(found["image_embedding"], expected["image_embedding"], atol=1e-3)
    loader = DataLoader(feed(there), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert [batch["id"].tolist() for batch in loader] == [batch["id"].tolist() for batch in local]

    options = ["--format", "clip-retrieval", "--output", "s3://corpus/feed/layout", "--rows-per-file", "20"]
    assert cli.main(["export", there, *options]) == 0
    bring = ["import", "s3://corpus/feed/layout", "--output", "s3://corpus/feed/back", "--model", towers.DEMO]
    assert cli.main([*bring, "--device", "cpu", "--quiet"]) == 0
    for name in ("key", "caption", "image_embedding", "text_embedding"):
        assert rows("s3://corpus/feed/back")[name].equals(rows(there)[name])
    assert verify.findings("s3://corpus/feed/back") == []


def test_a_key_is_taken_as_it_is(store: Path) -> None:
    name = "odd/a b%20#c.tar"
    put(name, (store / "shards" / "shards-000.tar").read_bytes())
    assert embed("s3://corpus/odd/*.tar", "s3://corpus/odd table") == 0
    found = rows("s3://corpus/odd table")
    assert set(found["shard"].to_pylist()) == {f"s3://corpus/{name}"} and found.num_rows == 12
    assert verify.findings("s3://corpus/odd table") == []


@pytest.mark.slow
def test_a_killed_run_repeated_gives_the_same_table(store: Path) -> None:
    place = "s3://corpus/killed"
    command = [
        sys.executable, "-m", "pipelines.cli", "embed", "--input", "s3://corpus/shards/shards-00{0,1,3}.tar",
        "--output", place, "--model", towers.DEMO, "--device", "cpu", "--workers", "1", "--quiet",
    ]  # fmt: skip
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline and not files.list_files(f"{place}/manifest"):
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert INSIDE.encode() not in run.communicate()[1]
    before = manifest.read(place).by_unit
    assert 1 <= len(before) <= 3
    assert embed("s3://corpus/shards/shards-00{0,1,3}.tar", place) == 0
    after = manifest.read(place).by_unit
    assert all(after[unit] == record for unit, record in before.items()), "what was recorded was done again"
    assert verify.findings(place) == []
    assert rows(place).num_rows == 36


@pytest.mark.parametrize("place", [f"s3://{KEY}:{SECRET}@corpus/shards/*.tar", f"s3://{KEY}:{SECRET[3:]}@corpus/x"])
def test_a_place_with_credentials_is_refused(place: str, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["embed", "--input", place, "--output", "s3://corpus/no", "--model", towers.DEMO],
        ["embed", "--input", "s3://corpus/shards", "--output", place, "--model", towers.DEMO],
        ["status", place],
        ["verify", place],
        ["retry", place],
        ["index", place, "--output", "s3://corpus/no"],
        ["search", place, "--text", "x"],
        ["dedup", place, "--output", "s3://corpus/no"],
        ["serve", place, "--port", "0"],
    ):
        assert cli.main(arguments) == 2, arguments
        said = capsys.readouterr()
        assert "must not hold credentials" in said.err and "Traceback" not in said.err
        assert "s3cr3t" not in said.out + said.err and KEY not in said.out + said.err


def test_what_is_wrong_with_the_store_is_said(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert embed("s3://nosuchbucket/*.tar", "s3://corpus/no") == 2
    assert "s3://nosuchbucket" in capsys.readouterr().err
    assert embed("nosuch://corpus/*.tar", "s3://corpus/no") == 2
    assert cli.main(["status", "nosuch://corpus/table"]) == 2
    assert "nosuch" in capsys.readouterr().err


def test_no_secret_is_in_any_object_or_record(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert embed("s3://corpus/shards/shards-000.tar", "s3://corpus/secret", f"--s3_secret_access_key={SECRET}") == 0
    assert embed("s3://corpus/shards/shards-000.tar", "s3://corpus/secret", "--s3_session_token", SECRET) == 0
    held = objects()
    assert any(re.search(r"runs/.*\.json$", name) for name in held)
    for name, data in held.items():
        for secret in (SECRET, INSIDE, KEY, SECRET.replace("/", "\\/"), SECRET.replace("+", "%2B")):
            assert secret.encode() not in data, f"{secret} in {name}"
    said = capfd.readouterr()
    assert INSIDE not in said.out + said.err and KEY not in said.out + said.err
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET

"""A small real Flink cluster on loopback with Beam's job server and a pool of Python workers, by one command.

    python infra/flink/cluster.py start     fetches the jars, starts what is not running, says how to use it
    python infra/flink/cluster.py status    what runs, and its process
    python infra/flink/cluster.py stop

A JobManager, two TaskManagers, the job server and the workers are processes of their own. Needs Java 11 or 17 and
Maven; jars, logs and process numbers lie in a folder of the user's cache, or in --folder.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusion-flink"
TASK_MANAGERS = ("taskmanager-1", "taskmanager-2")
SLOTS = 2  # of each TaskManager, so that one can take over the other's work
_OPENS = "java.lang java.lang.invoke java.lang.reflect java.net java.nio java.io java.text java.time java.util \
java.util.concurrent java.util.concurrent.atomic java.util.concurrent.locks"  # what Kryo and Flink look into


class Cluster:
    """The processes of a cluster whose state lies in `folder`; its ports are the five from `port` on."""

    def __init__(self, folder: Path = CACHE / "cluster", port: int = 18080, python: str = sys.executable):
        self.folder, self.python, self.jars = folder, python, CACHE / "jars"
        self._started: list[subprocess.Popen[bytes]] = []
        self.rpc, self.rest, self.job, self.artifacts, self.pool = range(port, port + 5)

    @property
    def beam_options(self) -> list[str]:
        """What `fusion embed`, `fuse` and `index` need to run here."""
        return [
            "--runner=PortableRunner",
            f"--job_endpoint=localhost:{self.job}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{self.pool}",
            f"--parallelism={len(TASK_MANAGERS)}",
        ]

    def start(self) -> None:
        """Starts what is not running and returns when two TaskManagers have registered."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fetch(self.jars)
        (self.folder / "flink-conf.yaml").write_text("".join(f"{name}: {value}\n" for name, value in self._settings()))
        flink = "org.apache.flink.runtime"
        configured = ["--configDir", str(self.folder)]
        self._java("jobmanager", 384, f"{flink}.entrypoint.StandaloneSessionClusterEntrypoint", configured)
        for name in TASK_MANAGERS:
            own = ["-D", f"taskmanager.resource-id={name}-{time.time_ns()}"]
            self._java(name, 384, f"{flink}.taskexecutor.TaskManagerRunner", [*configured, *own])
        self._wait("two TaskManagers", lambda: self._overview()["taskmanagers"] == len(TASK_MANAGERS))
        self._java(
            "jobserver", 256, "org.apache.beam.runners.flink.FlinkJobServerDriver",
            [f"--flink-master=localhost:{self.rest}", f"--flink-conf-dir={self.folder}", "--job-host=localhost",
             f"--job-port={self.job}", f"--artifact-port={self.artifacts}", "--expansion-port=0",
             f"--artifacts-dir={self.folder}/artifacts"],
        )  # fmt: skip
        self._start_pool()
        for what, port in (("the job server", self.job), ("the worker pool", self.pool)):
            self._wait(what, lambda port=port: socket.create_connection(("localhost", port), 1).close() or True)

    def stop(self) -> None:
        """Ends the processes, workers first, that they may not be started again."""
        for name in ("pool", "jobserver", *TASK_MANAGERS, "jobmanager"):
            self.kill(name, signal.SIGTERM)
        deadline = time.monotonic() + 15
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.2)
        for name in self.running():
            self.kill(name, signal.SIGKILL)
        for process in self._started:
            process.wait()
        for path in self.folder.glob("*.pid"):
            path.unlink()

    def running(self) -> dict[str, int]:
        """The process of each part that runs."""
        # A process that dies has no command line for a while before its parent hears of its end.
        alive = [process.pid for process in self._started if process.poll() is None]
        found = {}
        for path in sorted(self.folder.glob("*.pid")):
            pid = int(path.read_text())
            if pid in alive or _is_ours(pid, path.stem, self.folder):
                found[path.stem] = pid
        return found

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to one part, if it runs."""
        if pid := self.running().get(name):
            os.kill(pid, how)

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs that the JobManager knows, as its REST interface tells them."""
        return list(self._get("/v1/jobs/overview")["jobs"])

    def failures(self, job: str) -> list[str]:
        """Why attempts of a job failed, also of one that came to its end at a later attempt."""
        entries = self._get(f"/v1/jobs/{job}/exceptions")["exceptionHistory"]["entries"]
        return [str(entry["stacktrace"]) for entry in entries]

    def _overview(self) -> dict[str, Any]:
        return self._get("/v1/overview")

    def _get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://localhost:{self.rest}{path}", timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def _settings(self) -> list[tuple[str, object]]:
        """Flink's configuration. A TaskManager that starts without Flink's scripts must be told all of its memory."""
        return [
            ("jobmanager.rpc.address", "localhost"),
            ("jobmanager.rpc.port", self.rpc),
            ("jobmanager.bind-host", "localhost"),
            ("rest.address", "localhost"),
            ("rest.bind-address", "localhost"),
            ("rest.port", self.rest),
            ("web.submit.enable", "false"),
            ("taskmanager.host", "localhost"),
            ("taskmanager.bind-host", "localhost"),
            ("taskmanager.numberOfTaskSlots", SLOTS),
            ("taskmanager.cpu.cores", 1.0),
            ("taskmanager.memory.task.heap.size", "256m"),
            ("taskmanager.memory.task.off-heap.size", "0"),
            ("taskmanager.memory.framework.heap.size", "128m"),
            ("taskmanager.memory.framework.off-heap.size", "64m"),
            ("taskmanager.memory.network.min", "32m"),
            ("taskmanager.memory.network.max", "32m"),
            ("taskmanager.memory.managed.size", "64m"),
            ("taskmanager.memory.jvm-metaspace.size", "256m"),
            ("taskmanager.memory.jvm-overhead.min", "64m"),
            ("taskmanager.memory.jvm-overhead.max", "64m"),
            ("cluster.evenly-spread-out-slots", "true"),  # else both workers' units land on one TaskManager
            ("heartbeat.interval", 2000),
            ("heartbeat.timeout", 120000),  # of one that is starved; a killed one is noticed by its closed connection
            ("restart-strategy.type", "fixed-delay"),  # Beam's own default is no second try
            ("restart-strategy.fixed-delay.attempts", 5),
            ("restart-strategy.fixed-delay.delay", "1s"),
            ("client.timeout", "20s"),  # how soon a dead JobManager is noticed
            ("rest.retry.max-attempts", 4),
            ("classloader.resolve-order", "parent-first"),  # Beam's classes are in the cluster's class path already
            ("io.tmp.dirs", self.folder / "tmp"),
        ]

    def _java(self, name: str, heap_mb: int, main: str, arguments: list[str]) -> None:
        (self.folder / "tmp").mkdir(exist_ok=True)
        opens = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _OPENS.split()]
        small = [f"-Xmx{heap_mb}m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:MaxMetaspaceSize=256m"]
        self._start(
            name,
            ["java", *small, *opens, _marker(name, self.folder), f"-Djava.io.tmpdir={self.folder}/tmp",
             "-Dorg.slf4j.simpleLogger.showDateTime=true",
             "-cp", str(_class_path(self.jars)), main, *arguments],
        )  # fmt: skip

    def _start_pool(self) -> None:
        roots = os.pathsep.join(filter(None, [str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]))
        self._start(
            "pool",
            [self.python, str(HERE / "pool.py"), str(self.pool)],
            {"PYTHONPATH": roots, "FUSION_FLINK": _marker("pool", self.folder)},
        )

    def _start(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> None:
        if name in self.running():
            return
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, **(environment or {})},
            )  # fmt: skip
        while process.poll() is None and not _is_ours(process.pid, name, self.folder):
            time.sleep(0.01)  # for an instant after its start, a process has no command line
        self._started.append(process)
        (self.folder / f"{name}.pid").write_text(str(process.pid))

    def _wait(self, what: str, ready: Callable[[], bool], seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if ready():
                    return
            except OSError:
                pass
            fallen = {path.stem for path in self.folder.glob("*.pid")} - self.running().keys()
            if fallen or time.monotonic() > deadline:
                why = f"{sorted(fallen)[0]} ended" if fallen else f"not within {seconds:.0f} s"
                raise RuntimeError(f"{what} did not come ({why}): see {self.folder}/*.log")
            time.sleep(0.3)


def fetch(jars: Path) -> None:
    """Fetches what pom.xml names from Maven Central, unless it is there; raises RuntimeError saying what failed."""
    pom = HERE / "pom.xml"
    stamp = jars / "complete"
    if stamp.exists() and stamp.read_bytes() == pom.read_bytes():
        return
    command = ["mvn", "-B", "-ntp", "-q", "-f", str(pom), "dependency:copy-dependencies", f"-DoutputDirectory={jars}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    except FileNotFoundError:
        raise RuntimeError("cannot fetch the jars of Flink and Beam: install Maven (mvn)") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError("cannot fetch the jars of Flink and Beam: Maven is at it for half an hour") from None
    if done.returncode:
        reason = next((line for line in done.stdout.splitlines() if "ERROR" in line), done.stderr)
        raise RuntimeError(f"cannot fetch the jars of Flink and Beam: {reason}")
    stamp.write_bytes(pom.read_bytes())


def _class_path(jars: Path) -> Path:
    """A jar that does nothing but name the others: the job server sends its class path to the cluster with each job."""
    listed = sorted(path for path in jars.glob("*.jar") if path.name != "class-path.jar")
    lines = ["Manifest-Version: 1.0", "Class-Path: " + " ".join(path.as_uri() for path in listed)]
    folded = "".join(_fold(line) for line in lines)
    target = jars / "class-path.jar"
    with zipfile.ZipFile(target.with_suffix(f".{os.getpid()}"), "w") as jar:
        jar.writestr("META-INF/MANIFEST.MF", folded + "\r\n")
    target.with_suffix(f".{os.getpid()}").replace(target)
    return target


def _fold(line: str) -> str:
    """A manifest's lines end after 72 bytes."""
    return "\r\n ".join([line[:70], *(line[i : i + 69] for i in range(70, len(line), 69))]) + "\r\n"


def _marker(name: str, folder: Path) -> str:
    return f"-Dfusion.flink={folder}:{name}"


def _is_ours(pid: int, name: str, folder: Path) -> bool:
    """Whether a process number still is this part's: another process may have it by now."""
    try:
        seen = [Path(f"/proc/{pid}/{what}").read_bytes() for what in ("cmdline", "environ")]
    except OSError:
        return False
    return any(_marker(name, folder).encode() in text for text in seen)


def main() -> int:
    parser = argparse.ArgumentParser(description="A Flink cluster on loopback for fusion's jobs.")
    parser.add_argument("what", choices=("fetch", "start", "status", "stop"))
    parser.add_argument("--folder", type=Path, default=CACHE / "cluster", help="state and logs (default: %(default)s)")
    parser.add_argument("--port", type=int, default=18080, help="the first of five (default: %(default)s)")
    args = parser.parse_args()
    cluster = Cluster(args.folder.resolve(), args.port)
    try:
        if args.what == "fetch":
            fetch(cluster.jars)
        elif args.what == "start":
            cluster.start()
            print(f"Flink's page: http://localhost:{cluster.rest}; logs: {cluster.folder}")
            print("add to fusion embed, retry, fuse or index:\n  " + " ".join(cluster.beam_options))
        elif args.what == "stop":
            cluster.stop()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for name, pid in cluster.running().items():
        print(f"{name:<14} {pid}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

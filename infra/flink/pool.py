"""A pool of Beam's Python workers that several TaskManagers of one machine can share.

    python infra/flink/pool.py PORT

Every TaskManager numbers its workers by itself, so two of them ask one pool for the same names. Beam's own pool
(`worker_pool_main`) then stops whichever of the two came last: the other TaskManager's job fails, and again at each
restart. Here nobody stops a worker by its name: it ends when its own TaskManager closes the stream over which it is
told what to do. Beam's own goes on with the rest of its bundle then, beside the worker that took it over.
"""

import os
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from apache_beam.runners.worker.sdk_worker import SdkHarness


class Pool(beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolServicer):  # type: ignore[misc]  # Beam has no types here
    """Starts workers under the pool's own Python, in its environment, with its output."""

    def StartWorker(
        self, request: beam_fn_api_pb2.StartWorkerRequest, _: grpc.ServicerContext
    ) -> beam_fn_api_pb2.StartWorkerResponse:
        command = [sys.executable, str(Path(__file__).resolve()), request.control_endpoint.url, request.worker_id]
        worker = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        threading.Thread(target=worker.wait, daemon=True).start()  # or it would stay as a zombie
        return beam_fn_api_pb2.StartWorkerResponse()

    def StopWorker(
        self, _request: beam_fn_api_pb2.StopWorkerRequest, _: grpc.ServicerContext
    ) -> beam_fn_api_pb2.StopWorkerResponse:
        return beam_fn_api_pb2.StopWorkerResponse()


def work(endpoint: str, worker_id: str) -> None:
    """Is a worker until its TaskManager lets it go or is gone, or the pool is."""
    pool = os.getppid()
    harness = SdkHarness(endpoint, worker_id=worker_id)
    threading.Thread(target=harness.run, daemon=True).start()
    while harness._alive and os.getppid() == pool:
        time.sleep(0.2)
    os._exit(0)  # what is in flight is not recorded yet, and done again


def main() -> None:
    if len(sys.argv) == 3:
        work(*sys.argv[1:])
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    server.add_insecure_port(f"localhost:{int(sys.argv[1])}")
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(Pool(), server)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()

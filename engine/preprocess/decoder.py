"""The decoder: a process that runs the graph, so that a crash, a hang or a leak in it costs one image.

`Decoder` is the engine's end, `main` the process. They speak over a socket: a request is one byte an image
(1: to be decoded on the host first) and then the images; the reply a JSON object and then the pixels.

libjpeg tells of damage on standard error only, and goes on with whatever it has. In a process of its own
that is a clean channel: a batch about which it said something is refused, and looked at image by image.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from engine.errors import EngineError, UsageError

if TYPE_CHECKING:
    from engine.preprocess.graph import Graph

DECODE_TIMEOUT_S = 120  # of one request; an image of 100 megapixels takes seconds
RETIRE_BYTES = 3 << 30  # a decoder that has grown beyond is replaced by a fresh one
CHECK_MEMORY_EVERY = 256  # requests
_ONE_PIXEL = b"P5 1 1 255\n\x80"
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file", "Inconsistent progression sequence")
# libjpeg tells only the first of an image's warnings, so that one of these may hide damage
_MAY_HIDE_DAMAGE = (
    "Corrupt JPEG data: bad ICC marker",
    "Invalid SOS parameters for sequential JPEG",
    "Unknown Adobe color transform code",
    "Warning: unknown JFIF revision number",
)
MAY_HIDE_DAMAGE = "decoder_warning"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class RefusedError(Exception):
    """The decoder could not decode all images of a request; the text is about one image if it was alone."""


class CrashedError(Exception):
    """The decoder died over a request."""


@dataclass(frozen=True)
class Decoded:
    pixels: npt.NDArray[np.uint8]  # [N, 1, H, W]
    flags: tuple[str, ...] = ()


class Decoder:
    """The engine's end. The process starts at once, and anew with the first request after a crash."""

    def __init__(self, *, size: tuple[int, int], batch_size: int, threads: int) -> None:
        self.size, self.batch_size, self.crashes = size, batch_size, 0
        numbers = (*size, batch_size, threads, DECODE_TIMEOUT_S, RETIRE_BYTES)
        self._arguments = [str(number) for number in numbers]
        self._ready = False
        self._start()

    def decode(self, images: Sequence[bytes], on_host: Sequence[bool]) -> Decoded:
        """At most `batch_size` images, all or none. Raises RefusedError or CrashedError."""
        self._await_start()
        try:
            self._connection.send_bytes(bytes(on_host))
            for image in images:
                self._connection.send_bytes(image)
            reply = json.loads(self._connection.recv_bytes())
            if "refused" in reply:
                raise RefusedError(reply["refused"])
            pixels = np.frombuffer(self._connection.recv_bytes(), np.uint8)
        except (EOFError, OSError):
            self.crashes += 1
            reason = self._end()
            self._start()
            raise CrashedError(reason) from None
        if reply["retire"]:
            self._end()
            self._start()
        return Decoded(pixels.reshape(len(images), 1, *self.size), tuple(reply["flags"]))

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, open(os.devnull, "rb+") as nothing:
            self._said = os.memfd_create("decoder", os.MFD_CLOEXEC)
            fcntl.fcntl(self._said, fcntl.F_SETFL, os.O_APPEND)
            root = str(Path(__file__).parents[2])
            path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), *self._arguments],
                stdin=nothing,
                stdout=nothing,
                stderr=self._said,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the engine
            )
        self._connection = Connection(ours.detach())
        self._ready = False

    def _await_start(self) -> None:
        if self._ready:
            return
        try:
            answer = self._connection.recv_bytes().decode()
        except (EOFError, OSError):
            raise EngineError(f"the decoder does not start: {self._end()}") from None
        if answer != "ready":
            raise UsageError(answer)
        self._ready = True

    def _end(self) -> str:
        """Let the process end, and say how it did."""
        self._connection.close()
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        said = os.pread(self._said, 1 << 16, 0).decode(errors="replace")
        os.close(self._said)
        if status == -signal.SIGALRM:
            return f"stopped after {DECODE_TIMEOUT_S} s"
        if status < 0:
            return f"ended by {signal.Signals(-status).name}"
        return f"ended with status {status}: {_one_line(said.strip().splitlines()[-1:])}"

    def cpu_s(self) -> float:
        """Seconds of processor time that the present process has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _one_line(lines: Sequence[str]) -> str:
    text = " ".join(_COLOUR.sub("", " ".join(lines)).split())
    return "".join(letter for letter in text if letter.isprintable())[:200]


def main(arguments: Sequence[str]) -> None:
    """The process: serve until the engine closes its end, or is gone."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the engine says when to stop
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # short of memory, this process goes and not the engine
        Path("/proc/self/oom_score_adj").write_text("500")
    descriptor, height, width, batch_size, threads, timeout_s, retire_bytes = map(int, arguments)
    connection = Connection(descriptor)
    try:
        graph = _graph(height, width, batch_size, threads)
    except EngineError as error:
        connection.send_bytes(str(error).encode())
        return
    connection.send_bytes(b"ready")
    with contextlib.suppress(EOFError, ConnectionError), ThreadPoolExecutor(threads) as pool:
        serve(connection, graph, pool, timeout_s=timeout_s, retire_bytes=retire_bytes)


def _graph(height: int, width: int, batch_size: int, threads: int) -> Graph:
    from engine.preprocess.graph import DecodeError, Graph

    graph = Graph(size=(height, width), batch_size=batch_size, threads=threads)
    try:
        graph.run([_ONE_PIXEL])  # a graph that can't decode this would call every row corrupt
    except DecodeError as error:
        raise EngineError(f"DALI can't decode: {_one_line([str(error)])}") from None
    return graph


def serve(
    connection: Connection, graph: Graph, pool: ThreadPoolExecutor, *, timeout_s: int, retire_bytes: int
) -> None:
    """Answer requests; raises EOFError when the engine has closed its end."""
    from engine.preprocess.depth import to_gray_pnm
    from engine.preprocess.graph import DecodeError

    def prepared(image: bytes, on_host: int) -> bytes:
        return to_gray_pnm(image) if on_host else image

    for number in range(1, sys.maxsize):
        on_host = connection.recv_bytes()
        images = [connection.recv_bytes() for _ in on_host]
        os.ftruncate(2, 0)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)  # its signal ends the process
        try:
            pixels = graph.run(list(pool.map(prepared, images, on_host)))
            flags = _judged(os.pread(2, 1 << 16, 0).decode(errors="replace"), alone=len(images) == 1)
        except (DecodeError, RefusedError, ValueError, MemoryError) as error:
            connection.send_bytes(json.dumps({"refused": _reason(error)}).encode())
        else:
            retire = number % CHECK_MEMORY_EVERY == 0 and _resident_bytes() > retire_bytes
            connection.send_bytes(json.dumps({"flags": flags, "retire": retire}).encode())
            connection.send_bytes(pixels.tobytes())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _judged(said: str, *, alone: bool) -> list[str]:
    """Flags for what libjpeg said. Raises RefusedError for damage, or what only a look at each tells."""
    hiding = [line for line in said.splitlines() if line.startswith(_MAY_HIDE_DAMAGE)]
    damage = [line for line in said.splitlines() if line.startswith(_DAMAGE) and line not in hiding]
    if damage or (hiding and not alone):
        raise RefusedError(_one_line(damage[:1]))
    return [MAY_HIDE_DAMAGE] if hiding else []


def _reason(error: Exception) -> str:
    from engine.preprocess.graph import DecodeError

    said = [line for line in os.pread(2, 1 << 16, 0).decode(errors="replace").splitlines() if line.strip()]
    if isinstance(error, DecodeError):
        return _one_line(said[:1]) or "the image is damaged"
    return _one_line([str(error)])


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(sys.argv[1:])

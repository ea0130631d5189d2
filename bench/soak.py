"""How `dream serve` bears a crowd that behaves badly: `python -m bench.soak RUN|BUNDLE [SECONDS]`.

Whole and streamed requests among some that are left, come slowly, half, too large or as nonsense. Each must get its
status, the server must answer afterwards, and its memory mustn't grow. Writes docs/results/soak.json."""

import asyncio
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from bench.figures import write_table

CLIENTS = 16
LARGEST = 32 << 20
"""Bytes of a body, as the server's documentation says."""
PATIENCE = 60.0
Outcome = tuple[str, int]
"""What was sent, and the status that came; 0: the client didn't wait for one."""
WANTED: dict[str, tuple[int, ...]] = {
    "whole": (200,),
    "streamed": (200,),
    "slow": (200,),
    "left in the midst": (0,),
    "left unread": (0,),
    "half": (0,),
    "huge": (413,),
    "cut": (400,),
    "no JSON": (400,),
    "wrong field": (400,),
    "no such student": (404,),
    "no such path": (404, 405),
    "no HTTP": (400,),
}
"""What is sent → the statuses that are right."""


async def send(port: int, model: str, kind: str, draw: random.Random) -> Outcome:
    """One connection. Raises OSError or TimeoutError where the server doesn't answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        path, content, length = request(model, kind, draw)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        sent = draw.randbytes(60) + b"\r\n\r\n" if kind == "no HTTP" else head.encode() + content
        for part in [sent[i : i + 40] for i in range(0, len(sent), 40)] if kind == "slow" else [sent]:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.05 if kind == "slow" else 0)
        if kind in ("half", "left unread"):
            await asyncio.sleep(draw.random() / 4)
            return kind, 0
        if kind == "left in the midst":
            await reader.readuntil(b"\n{")
            return kind, 0
        answer = await reader.read()
        status = int(answer.split(b" ", 2)[1])
        if status == 200 and b'"done":true' not in answer:
            raise OSError(f"{kind}: the answer broke off")
        return kind, status
    finally:
        writer.close()


def request(model: str, kind: str, draw: random.Random) -> tuple[str, bytes, int]:
    """Path, body, and what is said of the body's length."""
    body: dict[str, Any] = {
        "model": "nobody" if kind == "no such student" else model,
        "prompt": " ".join(
            draw.choice(("rain", "glass", "why", "falls", "🙂", "\n")) for _ in range(draw.randint(1, 40))
        ),
        "stream": kind in ("streamed", "left in the midst"),
        "options": {"num_predict": draw.randint(4, 24), "seed": draw.getrandbits(31)},
    }
    if kind == "wrong field":
        field, value = draw.choice((("options", []), ("prompt", 3), ("stream", "yes"), ("think", 7), ("images", ["?"])))
        body[field] = value
    content = json.dumps(body).encode()
    if kind == "cut":
        content = content[: draw.randint(1, len(content) - 1)]
    elif kind == "no JSON":
        content = draw.choice((b"[]", b"\xff\xfe", b"[" * 9999, b"NaN", b'{"model": }', b""))
    path = (
        draw.choice(("/api/none", "/v1/chat", "/%00", "/api/chat/../../x"))
        if kind == "no such path"
        else "/api/generate"
    )
    return path, content, {"huge": LARGEST + 1, "half": len(content) + 99}.get(kind, len(content))


async def crowd(
    port: int, model: str, seconds: float, most: int = 10**9, seed: int = 0
) -> tuple[Counter[Outcome], list[str]]:
    """What came of the requests of CLIENTS clients: for so long, `most` at most; and what went wrong."""
    found, wrong, began = Counter[Outcome](), list[str](), time.monotonic()

    async def client(number: int) -> None:
        draw = random.Random(1000 * seed + number)
        while sum(found.values()) + len(wrong) < most and time.monotonic() - began < seconds:
            kind = draw.choice(list(WANTED))
            try:
                async with asyncio.timeout(PATIENCE):
                    outcome = await send(port, model, kind, draw)
            except (OSError, ValueError, IndexError, TimeoutError, asyncio.IncompleteReadError) as error:
                wrong.append(f"{kind}: {error!r}")
                continue
            found[outcome] += 1
            if outcome[1] not in WANTED[kind]:
                wrong.append(f"{kind}: status {outcome[1]}")

    await asyncio.gather(*map(client, range(CLIENTS)))
    return found, wrong


def resident(pid: int) -> float:
    """MiB of a process's memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    return int(found[1]) / 1024 if found else 0.0


def main(target: str, seconds: float = 600.0) -> None:
    rows, problems = list[dict[str, Any]](), list[str]()
    command = [sys.executable, "-P", "-m", "cli.main", "serve", target, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as server:
        try:
            assert server.stderr is not None
            said = server.stderr.readline()
            named = re.match(r"(\S+): at http://\S+:(\d+)", said)
            assert named, said
            threading.Thread(target=deque, args=(server.stderr, 0), daemon=True).start()  # or it waits to be read
            model, port = named[1], int(named[2])
            asyncio.run(crowd(port, model, min(60.0, seconds / 6)))  # what grows at first is no leak
            for part in range(5):
                found, wrong = asyncio.run(crowd(port, model, seconds / 6, seed=part + 1))
                problems += wrong
                served = sum(number for (_, status), number in found.items() if status == 200)
                row = {"name": f"part {part + 1} of 5", "requests": sum(found.values()) + len(wrong), "served": served}
                rows.append({**row, "wrong": len(wrong), "memory": resident(server.pid)})
        finally:
            server.terminate()
            server.wait()  # before its pipe is closed
    labels = {
        "requests": "requests",
        "served": "of them answered",
        "wrong": "wrong status, or none",
        "memory": "MiB after",
    }
    columns = {"name": {"label": ""}} | {key: {"label": label, "digits": 0} for key, label in labels.items()}
    write_table("soak", f"python -m bench.soak {Path(target).name} {seconds:g}", "2 shared cores", columns, rows)
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:3]))

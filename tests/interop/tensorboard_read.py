#!/usr/bin/env python3
"""The event files of a run, read by TensorBoard itself. See README.md beside this file.

Invariant: every point that TensorBoard shows is compared with the run's own metrics.jsonl, and none of either is missing;
a run that went on from an earlier checkpoint shows each step once. Absent on purpose: the web page.
"""

import argparse
import json
import math
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import tensorboard
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError as error:
    print(f"SKIP: tensorboard cannot be imported here ({error}); pip install tensorboard")
    sys.exit(0)

ROOT = Path(__file__).resolve().parents[2]
# What metrics.jsonl says, and the name of its curve.
CURVES = {
    ("step", "loss"): "train/loss",
    ("step", "lr"): "train/learning_rate",
    ("step", "grad_norm"): "train/grad_norm",
    ("step", "tokens_per_s"): "train/tokens_per_s",
    ("eval", "loss"): "valid/loss",
    ("eval", "perplexity"): "valid/perplexity",
}


def train(tallow, out, *more):
    data = ROOT / "assets/wikisql/valid.jsonl"
    options = [
        *("--model", ROOT / "assets/tiny", "--data", data, "--valid", data, "--out", out),
        *("--steps", 8, "--batch", 1, "--seq-len", 33, "--eval-every", 4, "--save-every", 4),
        *("--samples", 0, "--schedule", "cosine", "--json"),
    ]
    command = [str(part) for part in (tallow, "train", *options, *more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"tallow train exited with {done.returncode}: {done.stderr.strip()[-400:]}")


def said(out):
    """Points of each curve by metrics.jsonl: (step, value in f32)."""
    points = {tag: [] for tag in CURVES.values()}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        for (kind, key), tag in CURVES.items():
            if event["event"] == kind and event.get(key) is not None:
                value = struct.unpack("<f", struct.pack("<f", event[key]))[0]
                points[tag].append((event["step"], value))
    return points


def check(name, out):
    """TensorBoard's points are those of metrics.jsonl; True if so."""
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    failures = []
    for tag, want in said(out).items():
        got = [(e.step, e.value) for e in events.Scalars(tag)] if tag in tags else []
        if got != want or not got or not all(math.isfinite(v) for _, v in got):
            failures.append(f"{tag}: {got} for {want}")
    shown = sum(len(events.Scalars(tag)) for tag in tags)
    print(f"{'FAIL' if failures else 'ok  '} {name}: {len(tags)} curves, {shown} points")
    for failure in failures:
        print(f"     {failure}")
    return not failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tallow", type=Path, required=True, help="the binary")
    args = parser.parse_args()
    print(f"tensorboard {tensorboard.__version__}, Python {sys.version.split()[0]}")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train(args.tallow, out)
        good &= check("a run from beginning to end", out)
        # As if it had been killed after step 8 was told and before it was kept.
        shutil.rmtree(out / "checkpoints/step-000008")
        train(args.tallow, out, "--resume")
        files = len(list((out / "tensorboard").iterdir()))
        good &= check(f"the same gone on after step 4, in {files} files", out)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

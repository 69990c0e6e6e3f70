#!/usr/bin/env python3
"""Adapters to and from mlx-lm, through `tallow convert`: both sides must compute the same logits.

Invariant: an adapter that changes the logits too little to prove anything is a failure. Absent on purpose: network
access, and any machine but the CPU.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import mlx.core as mx
    import mlx_lm
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
    from mlx_lm.utils import load_model
except (ImportError, OSError) as error:
    print(f"SKIP: mlx-lm cannot be imported here ({error}); pip install 'mlx[cpu]' mlx-lm")
    sys.exit(0)

TOLERANCE = 5e-5
ALL = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
# What mlx-lm can say: fine_tune_type, num_layers, keys within a layer.
CASES = {
    "LoRA, all seven": ("lora", -1, ALL),
    "LoRA, q and v of the last layer": ("lora", 1, ["self_attn.q_proj", "self_attn.v_proj"]),
    "LoRA, whole paths": ("lora", -1, ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]),
    "DoRA, all seven": ("dora", -1, ALL),
}


class Tallow:
    def __init__(self, binary):
        self.binary = binary

    def must(self, *args):
        done = subprocess.run([str(self.binary), *map(str, args)], capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            raise RuntimeError(f"tallow {args[0]} exited with {done.returncode}: {done.stderr.strip()[-400:]}")
        return done.stdout

    def logits(self, model, ids, adapter=None):
        args = ["logits", "--model", model, "--ids", ",".join(map(str, ids)), "--json"]
        if adapter is not None:
            args += ["--adapter", adapter]
        return mx.array(json.loads(self.must(*args))["logits"])


def fresh(model_dir):
    """The model in f32."""
    model, _ = load_model(model_dir)
    model.set_dtype(mx.float32)
    return model


def for_both(model_dir, folder):
    """A copy that both read alike. Its config also says of positions what it says where that was before transformers
    5: mlx-lm looks there only. It has no sliding window: mlx-lm has none for Mistral, and would read on silently."""
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("adapter"))
    path = folder / "config.json"
    path.chmod(0o644)
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters", {})
    config.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    if rope.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", rope)
    if config.get("model_type") == "mistral":
        config["sliding_window"] = None
    path.write_text(json.dumps(config))
    return folder


def logits_of(model, ids):
    model.eval()
    return model(mx.array([ids]))[0]


def made_by_mlx(model_dir, folder, kind, layers, keys, seed):
    """An adapter folder as `mlx_lm.lora` leaves it, with random non-zero numbers; and the model that has it."""
    folder.mkdir()
    parameters = {"rank": 4, "scale": 2.5, "dropout": 0.0, "keys": list(keys)}
    model = fresh(model_dir)
    count = layers if layers > 0 else len(model.layers)
    linear_to_lora_layers(model, count, {**parameters, "keys": set(keys)}, use_dora=kind == "dora")
    mx.random.seed(seed)
    leaves = {}
    for name, value in tree_flatten(model.parameters()):
        last = name.rsplit(".", 1)[-1]
        if last in ("lora_a", "lora_b"):
            leaves[name] = mx.random.normal(value.shape) * 0.05
        elif last == "m":
            leaves[name] = value * (1 + mx.random.normal(value.shape) * 0.05)
    model.load_weights(list(leaves.items()), strict=False)
    mx.save_safetensors(str(folder / "adapters.safetensors"), leaves)
    config = {"fine_tune_type": kind, "num_layers": count, "lora_parameters": parameters, "model": str(model_dir)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="Hugging Face model directories")
    parser.add_argument("--tallow", type=Path, required=True, help="the binary")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    tallow = Tallow(args.tallow.resolve())
    print(f"mlx {mx.__version__}, mlx-lm {mlx_lm.__version__}, {tallow.must('--version').strip()}")
    failed = 0

    def line(ok, what, detail):
        nonlocal failed
        failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'} {what:<60} {detail}", flush=True)

    for model_dir in args.model:
        print(f"model {model_dir}")
        vocab = json.loads((model_dir / "config.json").read_text())["vocab_size"]
        ids = [(i * 7919 + 13) * 104729 % 65537 % vocab for i in range(24)]
        with tempfile.TemporaryDirectory(prefix="tallow-mlx-") as work:
            model_dir = for_both(model_dir, Path(work) / "model")
            bare = logits_of(fresh(model_dir), ids)
            apart = mx.abs(tallow.logits(model_dir, ids) - bare).max().item()
            line(apart <= TOLERANCE, "bare model", f"logits {apart:.1e}")
            for seed, (name, (kind, layers, keys)) in enumerate(CASES.items()):
                theirs_dir, peft_dir, back_dir = (Path(work) / f"{step}-{seed}" for step in ("mlx", "peft", "back"))
                try:
                    theirs = logits_of(made_by_mlx(model_dir, theirs_dir, kind, layers, keys, seed), ids)
                    effect = mx.abs(theirs - bare).max().item()
                    convert = ["convert", "--model", model_dir]
                    tallow.must(*convert, "--from", "mlx-lm", "--to", "peft", theirs_dir, peft_dir)
                    apart = mx.abs(tallow.logits(model_dir, ids, peft_dir) - theirs).max().item()
                    ok = apart <= TOLERANCE and effect >= 100 * TOLERANCE
                    line(ok, f"mlx-lm -> tallow: {name}", f"logits {apart:.1e}, adapter adds up to {effect:.2f}")
                    for how, base in [(" (without --model)", []), ("", ["--model", model_dir])]:
                        out = Path(f"{back_dir}{len(base)}")
                        tallow.must("convert", *base, "--from", "peft", "--to", "mlx-lm", peft_dir, out)
                        model = load_adapters(fresh(model_dir), str(out))
                        apart = mx.abs(logits_of(model, ids) - theirs).max().item()
                        line(apart <= TOLERANCE, f"tallow -> mlx-lm: {name}{how}", f"logits {apart:.1e}")
                except (RuntimeError, ValueError, KeyError, OSError) as error:
                    line(False, name, str(error)[-200:])
    print("all passed" if failed == 0 else f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

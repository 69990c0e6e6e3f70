#!/usr/bin/env python3
"""Adapters to and from Hugging Face PEFT: both sides must compute the same logits. See README.md beside this file.

Invariant: whatever is compared is compared twice, as logits and as what the adapter adds to the bare model's, so an
adapter that one side drops cannot pass. Absent on purpose: network access; models are local directories.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

transformers.utils.logging.disable_progress_bar()

TOLERANCE = 5e-5
# For merged models whose base is stored in 16 bits.
HALF_TOLERANCE = 0.1
DEFAULT_DATA = Path(__file__).resolve().parents[2] / "assets/wikisql/valid.jsonl"

# Every way a supported config can say which modules, at which rank and scale.
SUPPORTED = {
    "module list": dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "all seven": dict(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "all-linear": dict(r=4, lora_alpha=8, target_modules="all-linear"),
    "regex": dict(r=8, lora_alpha=8, target_modules=r".*\.(q|v|down)_proj"),
    "regex, one layer": dict(r=8, lora_alpha=8, target_modules=r".*\.layers\.0\.(self_attn\.o_proj|mlp\.gate_proj)"),
    "rslora": dict(r=16, lora_alpha=8, use_rslora=True, target_modules="all-linear"),
    "rank 1": dict(r=1, lora_alpha=2, target_modules=["k_proj", "up_proj"]),
    "rank 5": dict(r=5, lora_alpha=7, target_modules=["q_proj", "down_proj"]),
    "rank above a dimension": dict(r=80, lora_alpha=80, target_modules=["k_proj", "v_proj"]),
    "rank pattern": dict(
        r=8, lora_alpha=16, target_modules="all-linear", rank_pattern={"q_proj": 4, "layers.1.self_attn.v_proj": 16}
    ),
    "alpha pattern": dict(r=8, lora_alpha=16, target_modules="all-linear", alpha_pattern={"down_proj": 64}),
    "patterns, rslora": dict(
        r=8,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "gate_proj"],
        rank_pattern={"gate_proj": 3, r".*\.layers\.0\..*q_proj": 12},
        alpha_pattern={"gate_proj": 9, "v_proj": 1},
    ),
    "some layers": dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
    "dora": dict(r=8, lora_alpha=16, target_modules="all-linear", use_dora=True),
    "dora, some projections": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], use_dora=True),
    "embedding and output": dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens", "lm_head"], ensure_weight_tying=False
    ),
    "dora, rslora": dict(r=8, lora_alpha=8, use_rslora=True, target_modules="all-linear", use_dora=True),
}

# Of these the merged model is compared as well.
MERGED = ["all seven", "rslora", "dora", "embedding and output"]

# What tallow trains, by the options of `tallow train`.
TRAINED = {
    "LoRA": [],
    "rsLoRA": ["--rslora"],
    "DoRA": ["--dora"],
    "PiSSA": ["--init", "pissa"],
    "embedding and output": ["--targets", "q_proj,embed_tokens,lm_head"],
    "layers and ranks": ["--layers", "1-2", "--rank-pattern", "q_proj=12", "--dropout", "0.1", "--loraplus", "4"],
}

# What tallow must refuse, and the word its message must contain.
REFUSED = {
    "bias": dict(r=8, target_modules=["q_proj"], bias="all"),
    "lora_bias": dict(r=8, target_modules=["q_proj"], lora_bias=True),
    "modules_to_save": dict(r=8, target_modules=["q_proj"], modules_to_save=["norm"]),
    "layer_replication": dict(r=8, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]),
    "trainable_token_indices": dict(r=8, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3]}),
}


class Report:
    """Prints a line a check and remembers whether all passed."""

    def __init__(self):
        self.passed = self.failed = self.skipped = 0

    def line(self, ok, what, detail=""):
        self.passed += ok
        self.failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'} {what:<48} {detail}", flush=True)

    def skip(self, what, why):
        self.skipped += 1
        print(f"SKIP {what:<48} {why}", flush=True)


class Tallow:
    """The other side, through its command line."""

    def __init__(self, binary):
        self.binary = binary

    def run(self, *args):
        command = [str(self.binary), *map(str, args)]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)

    def must(self, *args):
        done = self.run(*args)
        if done.returncode != 0:
            raise RuntimeError(f"tallow {args[0]} exited with {done.returncode}: {done.stderr.strip()[-400:]}")
        return done.stdout

    def logits(self, model, ids, adapter=None):
        args = ["logits", "--model", model, "--ids", ",".join(map(str, ids)), "--json"]
        if adapter is not None:
            args += ["--adapter", adapter]
        logits = torch.tensor(json.loads(self.must(*args))["logits"], dtype=torch.float64)
        return logits.reshape(len(ids), -1)


class Case:
    """One model directory: ids to feed it and the bare logits of both sides."""

    def __init__(self, model, tallow, seed):
        self.dir = model
        self.tallow = tallow
        config = transformers.AutoConfig.from_pretrained(model)
        self.stored = config.dtype or torch.float32
        self.tied = config.tie_word_embeddings
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, config.vocab_size, (40,), generator=generator).tolist()
        self.bare = logits_of(self.base(), self.ids)
        self.bare_tallow = tallow.logits(model, self.ids) if tallow else None

    def base(self):
        """A fresh copy: PEFT changes the model it is given."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.dir, dtype=torch.float32).eval()

    def compare(self, report, what, adapter, theirs):
        """`theirs`: PEFT's logits with the adapter in directory `adapter`."""
        effect = (theirs - self.bare).abs().max().item()
        if effect < 100 * TOLERANCE:
            report.line(False, what, f"the adapter changes the logits by {effect:.1e} only, so equality shows nothing")
            return
        if self.tallow is None:
            report.skip(what, f"PEFT's half ran, adapter adds up to {effect:.2f}; no --tallow given")
            return
        try:
            ours = self.tallow.logits(self.dir, self.ids, adapter)
        except (RuntimeError, ValueError, KeyError, OSError, subprocess.TimeoutExpired) as error:
            report.line(False, what, str(error))
            return
        if ours.shape != theirs.shape:
            report.line(False, what, f"logits {list(ours.shape)}, PEFT has {list(theirs.shape)}")
            return
        apart = (ours - theirs).abs().max().item()
        added = ((ours - self.bare_tallow) - (theirs - self.bare)).abs().max().item()
        ok = apart <= TOLERANCE and added <= TOLERANCE
        report.line(ok, what, f"logits {apart:.1e}, adapter's part {added:.1e}, adapter adds up to {effect:.2f}")


@torch.no_grad()
def logits_of(model, ids):
    """`[len, vocab]` in f64."""
    return model(torch.tensor([ids])).logits[0].double()


def randomised(model, seed):
    """Fills every adapter matrix with normals; PEFT starts `B` at zero, which would hide it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            if "lora_magnitude" in name:
                parameter.mul_(1 + noise)
            elif "lora_" in name:
                parameter.copy_(noise)
    return model.eval()


def peft_to_tallow(case, report, work):
    for seed, (name, settings) in enumerate(SUPPORTED.items()):
        what = f"PEFT -> tallow: {name}"
        model = randomised(get_peft_model(case.base(), LoraConfig(task_type="CAUSAL_LM", **settings)), seed)
        adapter = work / f"peft-{seed}"
        model.save_pretrained(adapter)
        theirs = logits_of(model, case.ids)
        case.compare(report, what, adapter, theirs)
        if name in MERGED and case.tallow:
            merged_both_ways(case, report, work, name, adapter, model, theirs)


def merged_both_ways(case, report, work, name, adapter, model, theirs):
    """tallow's merge read by transformers, and PEFT's merge read by tallow, against PEFT's adapter."""
    ours = work / f"tallow-merged-{name}"
    try:
        case.tallow.must("merge", "--model", case.dir, "--adapter", adapter, "--out", ours)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32).eval()
        apart = (logits_of(loaded, case.ids) - theirs).abs().max().item()
        # A merged weight is rounded to the type its base is stored in.
        detail, bound = f"logits {apart:.1e}", TOLERANCE
        if case.stored != torch.float32:
            detail, bound = f"{detail}, rounded to {case.stored}", HALF_TOLERANCE
        report.line(apart <= bound, f"merged by tallow -> transformers: {name}", detail)
    except (RuntimeError, OSError, ValueError) as error:
        report.line(False, f"merged by tallow -> transformers: {name}", str(error)[-160:])
    if case.tied and "embedding" in name:
        # PEFT folds both into the one weight they share, so its merged model is not its adapter.
        report.skip(f"merged by PEFT -> tallow: {name}", "PEFT does not untie a tied model")
        return
    peft_merged = work / f"peft-merged-{name}"
    model.merge_and_unload().save_pretrained(peft_merged)
    try:
        apart = (case.tallow.logits(peft_merged, case.ids) - theirs).abs().max().item()
        report.line(apart <= TOLERANCE, f"merged by PEFT -> tallow: {name}", f"logits {apart:.1e}")
    except (RuntimeError, OSError, ValueError) as error:
        report.line(False, f"merged by PEFT -> tallow: {name}", str(error)[-160:])


def refusals(case, report, work):
    for word, settings in REFUSED.items():
        what = f"refused by name: {word}"
        model = randomised(get_peft_model(case.base(), LoraConfig(task_type="CAUSAL_LM", **settings)), 1)
        adapter = work / f"refused-{word}"
        model.save_pretrained(adapter)
        if case.tallow is None:
            report.skip(what, "PEFT's half ran; no --tallow given")
            continue
        ids = ",".join(map(str, case.ids))
        done = case.tallow.run("logits", "--model", case.dir, "--adapter", adapter, "--ids", ids, "--json")
        ok = done.returncode == 2 and word in done.stderr and "panicked" not in done.stderr
        report.line(ok, what, f"exit {done.returncode}: {done.stderr.strip()[-160:]}")


def tallow_to_peft(case, report, work, adapter, data):
    if adapter is not None:
        bound_by_peft(case, report, work, "tallow -> PEFT", adapter)
        return
    if case.tallow is None:
        report.skip("tallow -> PEFT", "no --tallow and no --adapter given")
        return
    if not (case.dir / "tokenizer.json").exists():
        report.skip("tallow -> PEFT", f"{case.dir} has no tokenizer to train with")
        return
    for name, options in TRAINED.items():
        what = f"tallow -> PEFT: {name}"
        adapter = work / f"trained-{name.replace(' ', '-')}"
        args = ["--data", data, "--steps", 20, "--seed", 1, "--lr", "5e-3", *options]
        try:
            case.tallow.must("train", "--model", case.dir, "--out", adapter, *args)
        except RuntimeError as error:
            report.line(False, what, str(error)[-160:])
            continue
        bound_by_peft(case, report, work, what, adapter)


def bound_by_peft(case, report, work, what, adapter):
    model = PeftModel.from_pretrained(case.base(), adapter).eval()
    stored = load_file(adapter / "adapter_model.safetensors")
    bound = get_peft_model_state_dict(model)
    lost = [name for name in stored if name not in bound or not torch.equal(bound[name], stored[name].float())]
    # Beside an adapter on the embedding PEFT saves the base's own weight; tallow does not.
    missing = [name for name in bound if name not in stored and not name.endswith(".base_layer.weight")]
    detail = f"{len(stored)} tensors in the file, not bound: {lost[:3]}, not in the file: {missing[:3]}"
    report.line(not lost and not missing, f"{what}: every tensor binds", detail)
    theirs = logits_of(model, case.ids)
    case.compare(report, f"{what}: logits", adapter, theirs)
    again = work / f"{adapter.name}-saved-again"
    model.save_pretrained(again)
    case.compare(report, f"{what} -> tallow: logits", again, theirs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="Hugging Face model directories")
    parser.add_argument("--tallow", type=Path, help="the binary; without it only PEFT's half runs")
    parser.add_argument("--adapter", type=Path, help="an adapter tallow trained on the (one) model; default: train one")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="JSONL to train on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.adapter and len(args.model) > 1:
        parser.error("--adapter belongs to one model; give one --model")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    tallow = Tallow(args.tallow.resolve()) if args.tallow else None
    if tallow:
        print(tallow.must("--version").strip())
    report = Report()
    for model in args.model:
        print(f"model {model}")
        with tempfile.TemporaryDirectory(prefix="tallow-interop-") as work:
            case = Case(model, tallow, args.seed)
            if tallow:
                apart = (case.bare - case.bare_tallow).abs().max().item()
                report.line(apart <= TOLERANCE, "bare model", f"logits {apart:.1e}")
            tallow_to_peft(case, report, Path(work), args.adapter, args.data)
            peft_to_tallow(case, report, Path(work))
            refusals(case, report, Path(work))
    print(f"{report.passed} passed, {report.failed} failed, {report.skipped} skipped")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())

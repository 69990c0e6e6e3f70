"""Models through mlx-lm: its Llama, its LoRA layers, its optimizer, the step compiled."""
import glob, json
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.lora import LoRALinear


class Job:
    def __init__(self, job, dtype):
        self.job, self.kind, (self.b, self.t) = job, job["kind"], job["of"]
        c = self.c = json.load(open(job["dir"] + "/config.json"))
        if c["model_type"] != "llama":
            raise ValueError("only Llama models are measured here")
        model = self.model = llama.Model(llama.ModelArgs.from_dict(c))
        weights = {}
        for path in sorted(glob.glob(job["dir"] + "/*.safetensors")):
            weights.update(mx.load(path))
        model.load_weights(list(model.sanitize(weights).items()))
        model.set_dtype(dtype)
        self.dtype = dtype
        model.freeze()
        modules = dict(model.named_modules())
        for name, rank, _, _ in job.get("parts", []):
            path, leaf = name.rsplit(".", 1)
            setattr(modules[path], leaf, LoRALinear.from_base(modules[name], r=rank, scale=2.0))
        if self.kind != "train" and "adapter" in job:
            w = mx.load(job["adapter"] + "/adapter_model.safetensors")
            ends = [f".lora_{x}.weight" for x in "AB"]
            self.set({n: [w["base_model.model." + n + e] for e in ends] for n, *_ in job["parts"]})
        mx.eval(model.parameters())

    def set(self, parts):
        modules = dict(self.model.named_modules())
        for name, (a, b) in parts.items():
            modules[name].lora_a, modules[name].lora_b = a.T.astype(self.dtype), b.T.astype(self.dtype)

    def parts(self, flat):
        """Flat numbers as those of A [rank, k] and B [n, rank] of every module."""
        at, out = 0, {}
        for name, rank, n, k in self.job["parts"]:
            a = flat[at : at + rank * k].reshape(rank, k)
            at += rank * k
            out[name] = (a, flat[at : at + n * rank].reshape(n, rank))
            at += n * rank
        return out

    def slot(self, state, name):
        """What the optimizer keeps of A and B of a module."""
        for key in name.split("."):
            state = state[int(key) if isinstance(state, list) else key]
        return [state["lora_a"], state["lora_b"]]

    def trained(self):
        if self.kind != "train":
            return []
        names = self.job["parts"]
        moments = [s["m"] for name, *_ in names for s in self.slot(self.optimizer.state, name)]
        return [mx.concatenate([m.T.reshape(-1) for m in moments])]

    def renew(self, xs):
        ids = xs[0].astype(mx.int32)
        if self.kind == "cached":
            self.x = ids.reshape(1, self.t)
            self.cache = make_prompt_cache(self.model)
            d = self.c.get("head_dim") or self.c["hidden_size"] // self.c["num_attention_heads"]
            for i, c in enumerate(self.cache):
                rows = [x.reshape(1, -1, self.c["num_key_value_heads"], d) for x in xs[2 + 2 * i : 4 + 2 * i]]
                c.keys, c.values = [mx.contiguous(x.transpose(0, 2, 1, 3).astype(self.dtype)) for x in rows]
                mx.eval(c.keys, c.values)
            self.kept = [(c.keys, c.values) for c in self.cache]
            return
        self.x, self.targets = ids.reshape(self.b, self.t), xs[1].astype(mx.int32).reshape(self.b, self.t)
        if self.kind != "train":
            return
        parts, first, second = (self.parts(x) for x in xs[5:8])
        self.set(parts)
        optimizer = optim.AdamW(learning_rate=1e-4, weight_decay=0.01)
        optimizer.init(self.model.trainable_parameters())
        self.optimizer = optimizer
        for name in parts:
            for slot, m, v in zip(self.slot(optimizer.state, name), first[name], second[name]):
                slot["m"], slot["v"] = m.T.astype(self.dtype), v.T.astype(self.dtype)
        model, state = self.model, [self.model.state, optimizer.state]

        def loss(ids, targets):
            return nn.losses.cross_entropy(model(ids).astype(mx.float32), targets, reduction="mean")

        grad = nn.value_and_grad(model, loss)

        @partial(mx.compile, inputs=state, outputs=state)
        def step(ids, targets):
            value, grads = grad(ids, targets)
            grads, norm = optim.clip_grad_norm(grads, 1.0)
            optimizer.update(model, grads)
            return value, norm

        self.step, self.state = step, state
        mx.eval(state)

    def run(self):
        if self.kind == "train":
            return list(self.step(self.x, self.targets))
        if self.kind == "cached":
            # Each run from the same cache, so that none has to wait for the one before. The cache writes into the arrays that it is
            # given, so it is given others over the same numbers.
            for c, (keys, values) in zip(self.cache, self.kept):
                c.keys, c.values, c.offset = mx.stop_gradient(keys), mx.stop_gradient(values), self.b
            return [self.model(self.x, cache=self.cache)[:, -1].astype(mx.float32)]
        logits = self.model(self.x).astype(mx.float32)
        return [nn.losses.cross_entropy(logits, self.targets, reduction="none")]

    def wait(self, ys):
        # A step is done when its parameters are.
        mx.eval(ys, *([self.state] if self.kind == "train" else []))

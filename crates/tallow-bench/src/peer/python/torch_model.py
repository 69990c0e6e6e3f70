"""Llama in PyTorch as a careful user would write it, and the same through transformers and PEFT.

A job takes operands as tensors and gives a function of no arguments; its results are a list of tensors.
"""
import glob, json

import torch
import torch.nn.functional as F


def job_parts(job, operands):
    """Flat parameters as A [rank, k] and B [n, rank] of every module."""
    at, out = 0, {}
    for name, rank, n, k in job["parts"]:
        a = operands[at : at + rank * k].reshape(rank, k)
        at += rank * k
        b = operands[at : at + n * rank].reshape(n, rank)
        at += n * rank
        out[name] = (a, b)
    return out


class Net(torch.nn.Module):
    """Weights frozen, adapters as parameters; `[b, t]` ids in, hidden `[b, t, c]` out."""

    def __init__(self, job, dtype, device):
        super().__init__()
        from safetensors.torch import load_file

        self.c = json.load(open(job["dir"] + "/config.json"))
        w = {}
        for path in sorted(glob.glob(job["dir"] + "/*.safetensors")):
            w.update(load_file(path))
        self.w = {k: v.to(device, dtype) for k, v in w.items()}
        self.head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        self.heads, self.kv = self.c["num_attention_heads"], self.c["num_key_value_heads"]
        self.d = self.c.get("head_dim") or self.c["hidden_size"] // self.heads
        self.eps, self.scale, self.dtype = self.c["rms_norm_eps"], 2.0, dtype
        theta = self.c.get("rope_theta") or self.c["rope_parameters"]["rope_theta"]
        freq = theta ** (-torch.arange(0, self.d, 2, dtype=torch.float32) / self.d)
        angles = torch.arange(4096, dtype=torch.float32)[:, None] * freq[None]
        self.cos = torch.cat([angles.cos()] * 2, -1).to(device, dtype)
        self.sin = torch.cat([angles.sin()] * 2, -1).to(device, dtype)
        self.lora = torch.nn.ParameterDict()
        self.prefix = {}
        for name, rank, n, k in job.get("parts", []):
            key = name.replace(".", "_")
            self.lora[key + "_a"] = torch.nn.Parameter(torch.zeros(rank, k))
            self.lora[key + "_b"] = torch.nn.Parameter(torch.zeros(n, rank))
            self.prefix[name] = key
        self.to(device)

    def pair(self, name):
        return [self.lora[self.prefix[name] + end] for end in ("_a", "_b")]

    def lin(self, x, name):
        y = x @ self.w[name + ".weight"].T
        key = self.prefix.get(name)
        if key is None:
            return y
        a, b = self.lora[key + "_a"].to(self.dtype), self.lora[key + "_b"].to(self.dtype)
        return y + ((x @ a.T) @ b.T) * self.scale

    def rope(self, x, at):
        t, half = x.shape[2], self.d // 2
        cos, sin = self.cos[at : at + t], self.sin[at : at + t]
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def forward(self, ids, at=0, cache=None):
        b, t = ids.shape
        x = self.w["model.embed_tokens.weight"][ids]
        for i in range(self.c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            h = F.rms_norm(x, x.shape[-1:], self.w[p + "input_layernorm.weight"], self.eps)

            def split(name, n):
                return self.lin(h, p + "self_attn." + name).view(b, t, n, self.d).transpose(1, 2)

            q, k = self.rope(split("q_proj", self.heads), at), self.rope(split("k_proj", self.kv), at)
            v = split("v_proj", self.kv)
            if cache is not None:
                ck, cv = cache[2 * i], cache[2 * i + 1]
                ck[:, :, at : at + t] = k
                cv[:, :, at : at + t] = v
                k, v = ck[:, :, : at + t], cv[:, :, : at + t]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1, enable_gqa=True)
            x = x + self.lin(y.transpose(1, 2).reshape(b, t, -1), p + "self_attn.o_proj")
            h = F.rms_norm(x, x.shape[-1:], self.w[p + "post_attention_layernorm.weight"], self.eps)
            gated = F.silu(self.lin(h, p + "mlp.gate_proj")) * self.lin(h, p + "mlp.up_proj")
            x = x + self.lin(gated, p + "mlp.down_proj")
        return F.rms_norm(x, x.shape[-1:], self.w["model.norm.weight"], self.eps)

    def loss(self, ids, targets, mean=True):
        logits = (self(ids) @ self.head.T).float()
        how = "mean" if mean else "none"
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), reduction=how)

    def last(self, ids, at, cache):
        return (self(ids, at, cache)[:, -1] @ self.head.T).float()


class Hugging(torch.nn.Module):
    """The same through transformers and PEFT."""

    def __init__(self, job, dtype, device):
        super().__init__()
        from transformers import AutoModelForCausalLM

        net = AutoModelForCausalLM.from_pretrained(job["dir"], dtype=dtype)
        if "adapter" in job:
            from peft import PeftModel

            net = PeftModel.from_pretrained(net, job["adapter"], is_trainable=job["kind"] == "train")
        self.net, self.c = net.to(device), json.load(open(job["dir"] + "/config.json"))
        self.train(job["kind"] == "train")

    def pair(self, name):
        base = self.net.base_model.model.get_submodule(name)
        return [base.lora_A["default"].weight, base.lora_B["default"].weight]

    def loss(self, ids, targets, mean=True):
        logits = self.net(input_ids=ids, use_cache=False).logits.float()
        how = "mean" if mean else "none"
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), reduction=how)

    def cached(self, values):
        from transformers import DynamicCache

        cache = DynamicCache()
        for i in range(len(values) // 2):
            cache.update(values[2 * i], values[2 * i + 1], i)
        return cache

    def last(self, ids, at, cache):
        y = self.net(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        cache.crop(-ids.shape[1])  # as it was
        return y


class Job:
    """One of: a training step; scores behind a cache; the loss of every token."""

    def __init__(self, job, dtype, name, device):
        self.job, self.name, self.dtype = job, name, dtype
        self.net = (Hugging if name == "peft" else Net)(job, dtype, device)
        self.kind, (self.b, self.t) = job["kind"], job["of"]
        compiled = torch.compile if name == "torch-compiled" else (lambda f: f)
        self.loss, self.last = compiled(self.net.loss), compiled(self.net.last)
        if self.kind != "train" and "adapter" in job and name != "peft":
            from safetensors.torch import load_file

            w = load_file(job["adapter"] + "/adapter_model.safetensors")
            ends = [f".lora_{x}.weight" for x in "AB"]
            pairs = {n: [w["base_model.model." + n + e] for e in ends] for n, *_ in job["parts"]}
            self.set(pairs)

    def set(self, parts):
        with torch.no_grad():
            for name, pair in parts.items():
                for to, value in zip(self.net.pair(name), pair):
                    to.copy_(value)

    def renew(self, xs):
        ids = xs[0].long()
        if self.kind == "cached":
            self.x = ids.reshape(1, self.t)
            c = self.net.c
            d = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
            caches = [x.reshape(1, -1, c["num_key_value_heads"], d).transpose(1, 2).to(self.dtype) for x in xs[2:]]
            if self.name == "peft":
                self.cache = self.net.cached([x[:, :, : self.b].contiguous() for x in caches])
            else:
                self.cache = [x.contiguous() for x in caches]
            return
        self.x, self.targets = ids.reshape(self.b, self.t), xs[1].long().reshape(self.b, self.t)
        if self.kind == "train":
            parts, first, second = (job_parts(self.job, x) for x in xs[5:8])
            self.set(parts)
            self.params = [p for name in parts for p in self.net.pair(name)]
            self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, weight_decay=0.01, fused=True)
            moments = [pair for name in parts for pair in zip(first[name], second[name])]
            for p, (m, v) in zip(self.params, moments):
                state = {"step": torch.tensor(1e6, device=p.device), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
                self.optimizer.state[p] = state

    def trained(self):
        if self.kind != "train":
            return []
        return [torch.cat([self.optimizer.state[p]["exp_avg"].reshape(-1) for p in self.params])]

    def run(self):
        if self.kind == "train":
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(self.x, self.targets)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            self.optimizer.step()
            return [loss.detach(), norm]
        with torch.inference_mode():
            if self.kind == "cached":
                return [self.last(self.x, self.b, self.cache)]
            return [self.loss(self.x, self.targets, False)]

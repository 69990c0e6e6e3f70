"""A peer of `tallow bench`: computes what it is asked, one request a line on stdin, one answer a line on stdout.

Arguments: the engine, threads, and where tallow computes ("cpu", "cuda:0", "wgpu:0"): the engine takes its own GPU
where tallow takes one. Operands come as files of f32; a result goes into one. A loop runs whole in here, so the
pipe is not timed; each repetition is fed a number made of the one before. tallow checks results, growth and floor itself.
"""
import array, importlib.metadata, json, os, struct, sys, time


def load(path):
    values = array.array("f")
    with open(path, "rb") as f:
        values.frombytes(f.read())
    return values


def f32(v):
    return struct.unpack("<f", struct.pack("<f", v))[0]


def next_link(y, i):
    bits = struct.unpack("<I", struct.pack("<f", y))[0]
    return f32(0.1 + 0.89 * (((bits * 2654435761 + i * 40503) >> 7) % (1 << 20)) / (1 << 20))


class Torch:
    lazy = False

    def __init__(self, name, threads, place):
        import torch

        self.t, self.name = torch, name
        self.dtype = torch.float32
        self.place, self.device = place, "cpu"
        if place != "cpu" and torch.cuda.is_available():
            self.device = place if place.startswith("cuda") else "cuda"
        elif place != "cpu" and torch.backends.mps.is_available():
            self.device = "mps"
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        if name == "peft":
            import peft

            self.peft = peft

    def version(self):
        v = self.t.__version__ + where(self.device, self.place)
        return f"{importlib.metadata.version('peft')} (torch {v})" if self.name == "peft" else v

    def half(self, half):
        self.dtype = self.t.bfloat16 if half else self.t.float32

    def tensor(self, values, shape=None):
        x = self.t.frombuffer(values, dtype=self.t.float32).clone().to(self.device)
        return x if shape is None else x.reshape(shape).to(self.dtype)

    def model(self, job):
        import torch_model

        if job["kind"] == "train again":
            return None
        return torch_model.Job(job, self.dtype, self.name, self.device)

    def make(self, job, w):
        f = self.plain(job, w)
        return self.t.compile(f) if f and self.name == "torch-compiled" else f

    def layer(self, job, w):
        if self.name == "peft":
            return None
        f, kind = self.t.nn.functional, job["kind"]
        if kind == "attention":

            def run(q, k, v, *_):
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return f.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        elif kind == "swiglu":

            def run(gate, up, *_):
                return f.silu(gate) * up
        elif kind == "cross_entropy":

            def run(x, target, *_):
                return f.cross_entropy(x @ w["w"].T, target.long(), reduction="none")
        elif kind == "rope":

            def run(x, cos, sin):
                half = x.shape[-1] // 2
                return x * cos + self.t.cat([-x[..., half:], x[..., :half]], -1) * sin
        elif self.name == "torch":
            return TorchStep(self.t)
        else:
            return None
        return self.t.compile(run) if self.name == "torch-compiled" else run

    def tables(self, pos, freq):
        angles = pos.reshape(-1, 1, 1) * self.t.cat([freq, freq])
        return angles.cos(), angles.sin()

    def gradients(self, f, xs, wrt):
        for x in wrt:
            x.requires_grad_()
        return self.t.autograd.grad(f(*xs), wrt, xs[-1])

    def plain(self, job, w):
        t = self.t
        if job["kind"] == "lora":
            if self.name == "peft":
                if job["rank"] == 0:
                    return None
                return self.wrapped(job, w)
            if job["rank"] == 0:
                return lambda x: x @ w["w"].T
            s = job["scale"]
            return lambda x: x @ w["w"].T + ((x @ w["a"].T) @ w["b"].T) * s
        if self.name == "peft":
            return None
        n, eps = [job["shape"][-1]], job["eps"]
        f = t.nn.functional
        if job["kind"] == "softmax":
            return lambda x: f.softmax(x, -1)
        if job["kind"] == "rms_norm":
            return lambda x: f.rms_norm(x, n, w["w"], eps)
        return lambda x: f.layer_norm(x, n, w["w"], w["b"], eps)

    def wrapped(self, job, w):
        t, rank = self.t, job["rank"]

        class Model(t.nn.Module):
            def __init__(self):
                super().__init__()
                self.lin = t.nn.Linear(job["k"], job["n"], bias=False, dtype=w["w"].dtype)

            def forward(self, x):
                return self.lin(x)

        model = Model()
        model.lin.weight.data = w["w"]
        alpha = job["scale"] * rank
        config = self.peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["lin"], lora_dropout=0.0)
        model = self.peft.inject_adapter_in_model(config, model).eval()
        model.lin.lora_A["default"].weight.data = w["a"]
        model.lin.lora_B["default"].weight.data = w["b"]
        return model

    def feed(self, x, v):
        x.detach().view(-1)[-1] = v
        return x

    def run(self, f, x):
        with self.t.inference_mode():
            return f(x)

    def all(self, ys):
        pass

    def many(self, f, xs):
        with self.t.inference_mode():
            return f(*xs)

    def settle(self, f, ys):
        pass

    def fed(self):
        # What feeds a repetition is not in its time.
        if self.device != "cpu":
            getattr(self.t, self.device.split(":")[0]).synchronize()

    def wait(self, y):
        return y.reshape(-1)[-1].item()

    def values(self, y):
        return array.array("f", y.detach().float().reshape(-1).tolist())


class Mlx:
    lazy = True

    def __init__(self, name, threads, place):
        # In f32 its products round to TF32 unless told not to, and are then INVALID; read once, at import.
        os.environ.setdefault("MLX_ENABLE_TF32", "0")
        import mlx.core as mx

        self.mx, self.name, self.dtype = mx, name, mx.float32
        self.place, self.device = place, "cpu"
        if place != "cpu" and mx.is_available(mx.gpu):
            self.device = "GPU"
        mx.set_default_device(mx.cpu if self.device == "cpu" else mx.gpu)
        if name == "mlx-lm":
            import mlx_lm  # noqa: F401

    def version(self):
        v = importlib.metadata.version("mlx") + where(self.device, self.place)
        v += blas() if self.device == "cpu" else ""
        if self.name == "mlx-lm":
            v = f"{importlib.metadata.version('mlx-lm')} (mlx {v})"
        return v

    def half(self, half):
        self.dtype = self.mx.bfloat16 if half else self.mx.float32

    def tensor(self, values, shape=None):
        x = self.mx.array(memoryview(values))
        x = x if shape is None else x.reshape(shape).astype(self.dtype)
        self.mx.eval(x)  # not in the time of the first that looks at it
        return x

    def layer(self, job, w):
        mx, kind = self.mx, job["kind"]
        if self.name != "mlx":
            return None
        import mlx.nn as nn

        if kind == "attention":

            def run(q, k, v, *_):
                q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
                scale = q.shape[-1] ** -0.5
                return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal").transpose(0, 2, 1, 3)
        elif kind == "swiglu":

            def run(gate, up, *_):
                return nn.silu(gate) * up
        elif kind == "cross_entropy":

            def run(x, target, *_):
                return nn.losses.cross_entropy(x @ w["w"].T, target.astype(mx.int32), reduction="none")
        elif kind == "rope":

            def run(x, cos, sin):
                half = x.shape[-1] // 2
                return x * cos + mx.concatenate([-x[..., half:], x[..., :half]], -1) * sin
        else:
            return MlxStep(mx)
        return run

    def tables(self, pos, freq):
        angles = pos.reshape(-1, 1, 1) * self.mx.concatenate([freq, freq])
        return self.mx.cos(angles), self.mx.sin(angles)

    def gradients(self, f, xs, wrt):
        rest = xs[len(wrt) :]
        return self.mx.vjp(lambda *w: f(*w, *rest), list(wrt), [xs[-1]])[1]

    def model(self, job):
        if self.name != "mlx-lm" or job["kind"] == "train again":
            return None
        import mlx_model

        return mlx_model.Job(job, self.dtype)

    def make(self, job, w):
        mx = self.mx
        if job["kind"] == "lora":
            if self.name == "mlx-lm":
                if job["rank"] == 0:
                    return None
                import mlx.nn as nn
                from mlx_lm.tuner.lora import LoRALinear

                base = nn.Linear(job["k"], job["n"], bias=False)
                base.weight = w["w"]
                layer = LoRALinear.from_base(base, r=job["rank"], scale=job["scale"])
                layer.lora_a, layer.lora_b = w["a"].T, w["b"].T
                mx.eval(layer.parameters())
                return layer
            if job["rank"] == 0:
                return lambda x: x @ w["w"].T
            s = job["scale"]
            return lambda x: x @ w["w"].T + ((x @ w["a"].T) @ w["b"].T) * s
        if self.name == "mlx-lm":
            return None
        eps = job["eps"]
        if job["kind"] == "softmax":
            return lambda x: mx.softmax(x, axis=-1)
        if job["kind"] == "rms_norm":
            return lambda x: mx.fast.rms_norm(x, w["w"], eps)
        return lambda x: mx.fast.layer_norm(x, w["w"], w["b"], eps)

    def feed(self, x, v):
        shape = x.shape
        x = x.reshape(-1)
        x[x.size - 1] = v
        x = x.reshape(shape)
        self.mx.eval(x)
        return x

    def run(self, f, x):
        return f(x)

    def many(self, f, xs):
        return f(*xs)

    def all(self, ys):
        self.mx.eval(*ys)

    def settle(self, f, ys):
        f.wait(ys)

    def fed(self):
        pass  # feed has waited

    def wait(self, y):
        self.mx.eval(y)
        return y.reshape(-1)[y.size - 1].item()

    def values(self, y):
        return array.array("f", y.astype(self.mx.float32).reshape(-1).tolist())


def where(device, place):
    if device != "cpu":
        return f", on {device}"
    return ", on the processor: it finds no GPU" if place != "cpu" else ""


def blas():
    """MLX's Linux wheel for CPUs carries the reference BLAS; OpenBLAS may be preloaded in its place."""
    if "blas" in os.environ.get("LD_PRELOAD", ""):
        return ", BLAS preloaded: " + os.environ["LD_PRELOAD"]
    try:
        with open("/proc/self/maps") as f:
            mapped = {line.split()[-1] for line in f if "blas" in line.rsplit("/", 1)[-1]}
    except OSError:
        return ""
    # Other packages bring one of their own.
    found = {path for path in mapped if "-packages/mlx" in path} or {path for path in mapped if "site-packages" not in path}
    for path in sorted(found):
        with open(path, "rb") as f:
            if b"OpenBLAS" in f.read():
                return ", OpenBLAS"
    return ", reference BLAS" if found else ""


class TorchStep:
    """Its AdamW on one parameter, far from the first step."""

    def __init__(self, torch):
        self.t = torch

    def renew(self, xs):
        p, m, v, g, h = xs
        lr, beta1, beta2, eps, decay = h.tolist()[:5]
        self.x = self.t.nn.Parameter(p)
        self.x.grad = g
        self.o = self.t.optim.AdamW([self.x], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, fused=True)
        step = self.t.tensor(1e6, device=p.device)
        self.o.state[self.x] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
        self.ys = [self.x.detach(), m, v]

    def run(self):
        self.o.step()
        return self.ys

    def wait(self, ys):
        pass


class MlxStep:
    """Its AdamW, which corrects nothing unless told to, on one array."""

    def __init__(self, mx):
        self.mx = mx

    def renew(self, xs):
        import mlx.optimizers as optim

        self.x, m, v, self.g, h = xs
        lr, beta1, beta2, eps, decay = h.tolist()[:5]
        self.o = optim.AdamW(learning_rate=lr, betas=[beta1, beta2], eps=eps, weight_decay=decay)
        self.o.init({"p": self.x})
        self.state = {"m": m, "v": v}

    def run(self):
        self.x = self.o.apply_single(self.g, self.x, self.state)
        return [self.x, self.state["m"], self.state["v"]]

    def wait(self, ys):
        self.mx.eval(ys)


class Layer:
    """A function of one tensor."""

    def __init__(self, engine, f, shape):
        self.e, self.f, self.shape = engine, f, shape

    def renew(self, paths):
        self.x = self.e.tensor(load(paths[0]), self.shape)

    def feed(self, link, scale):
        self.x = self.e.feed(self.x, f32(scale * link))

    def run(self):
        return [self.e.run(self.f, self.x)]

    def wait(self, ys):
        self.e.all(ys)
        return self.e.wait(ys[0])

    def results(self):
        return self.y


class Many(Layer):
    """A function of several tensors, or its gradients."""

    def __init__(self, engine, f, job):
        super().__init__(engine, f, None)
        self.job = job

    def renew(self, paths):
        self.xs = [self.e.tensor(load(p), s) for p, s in zip(paths, self.job["shapes"])]
        if self.job["kind"] == "rope":
            self.xs[1:] = self.e.tables(*self.xs[1:])

    def feed(self, link, scale):
        self.xs[0] = self.e.feed(self.xs[0], f32(scale * link))

    def run(self):
        if not self.job["backward"]:
            return [self.e.many(self.f, self.xs)]
        wrt = {"attention": 3, "swiglu": 2, "cross_entropy": 1}[self.job["kind"]]
        return self.e.gradients(self.f, self.xs, self.xs[:wrt])


class Step(Layer):
    """A step of an optimizer, which the next one goes on from."""

    def __init__(self, engine, f):
        super().__init__(engine, f, None)

    def renew(self, paths):
        self.f.renew([self.e.tensor(load(p)) for p in paths])

    def feed(self, link, scale):
        self.f.x = self.e.feed(self.f.x, f32(scale * link))

    def run(self):
        return self.f.run()

    def wait(self, ys):
        self.f.wait(ys)
        return self.e.wait(ys[0])


class Model(Layer):
    """A whole model; what is fed is the last token id."""

    def __init__(self, engine, f, vocab):
        self.e, self.f, self.vocab = engine, f, vocab

    def renew(self, paths):
        self.f.renew([self.e.tensor(load(p)) for p in paths])

    def feed(self, link, _):
        self.f.x = self.e.feed(self.f.x, int(f32(link * self.vocab)) % self.vocab)

    def run(self):
        return self.f.run()

    def wait(self, ys):
        self.e.settle(self.f, ys)
        return self.e.wait(ys[0])

    def results(self):
        return self.y + self.f.trained()


class Server:
    def __init__(self, engine):
        self.e, self.slots = engine, {}

    def hello(self, _):
        return {"version": self.e.version(), "lazy": self.e.lazy}

    def make(self, r):
        self.e.half(r["half"])
        job = r["job"]
        if "dir" in job:
            f = self.e.model(job)
            one = f and Model(self.e, f, job["vocab"])
        elif "shapes" in job:
            f = self.e.layer(job, {k: self.e.tensor(load(p), s) for k, (p, s) in r["weights"].items()})
            one = f and (Step(self.e, f) if job["kind"] == "adamw" else Many(self.e, f, job))
        else:
            weights = {k: self.e.tensor(load(p), s) for k, (p, s) in r["weights"].items()}
            f = self.e.make(job, weights)
            one = f and Layer(self.e, f, r["shape"])
        if not one:
            return {"slot": None}
        slot = max(self.slots, default=-1) + 1
        self.slots[slot] = one
        return {"slot": slot}

    def drop(self, r):
        del self.slots[r["slot"]]
        return {}

    def renew(self, r):
        one = self.slots[r["slot"]]
        one.renew(r["x"])
        one.y = None
        return {}

    def waited(self, r):
        one, links, total, link = self.slots[r["slot"]], [], 0.0, f32(r["first"])
        for i in range(r["n"]):
            one.feed(link, r["scale"])
            self.e.fed()
            start = time.perf_counter()
            one.y = one.run()
            value = one.wait(one.y)
            total += time.perf_counter() - start
            links.append([link, value])
            link = next_link(value, i)
        return {"seconds": total, "links": links}

    def queued(self, r):
        one = self.slots[r["slot"]]
        one.feed(f32(r["first"]), r["scale"])
        self.e.fed()
        start = time.perf_counter()
        for _ in range(r["n"]):
            one.y = one.run()
        built = time.perf_counter() - start
        value = one.wait(one.y)
        return {"built": built, "seconds": time.perf_counter() - start, "last": value}

    def finish(self, r):
        one = self.slots[r["slot"]]
        start = time.perf_counter()
        value = one.wait(one.y)
        return {"value": value, "seconds": time.perf_counter() - start}

    def fetch(self, r):
        one = self.slots[r["slot"]]
        start = time.perf_counter()
        for y in one.results() if one.y is not None else []:
            self.e.values(y)
        return {"seconds": time.perf_counter() - start}

    def result(self, r):
        each = [self.e.values(y) for y in self.slots[r["slot"]].results()]
        with open(r["path"], "wb") as f:
            for values in each:
                f.write(values.tobytes())
        return {"elements": [len(values) for values in each]}


def main():
    name, threads, place = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer

    def say(answer):
        out.write(json.dumps(answer) + "\n")
        out.flush()

    try:
        engine = Mlx if name.startswith("mlx") else Torch
        server = Server(engine(name, threads, place))
    except ImportError as e:
        return say({"missing": str(e)})
    for line in sys.stdin:
        r = json.loads(line)
        try:
            say(getattr(server, r["op"])(r))
        except Exception as e:  # the run goes on without this peer
            say({"error": f"{type(e).__name__}: {e}"})


main()

import ctypes, sys, os
rtc = ctypes.CDLL("libnvrtc.so.13")
def mma(n, tb):
    r = n // 2
    args = ", ".join(f"%{i}" for i in range(r))
    outs = ", ".join(f'"+f"(d[{i}])' for i in range(r))
    return (f'DEV void mma(float (&d)[{r}], u64 a, u64 b, u32 on) {{ asm volatile("{{\\n\\t.reg .pred p;\\n\\tsetp.ne.b32 p, %{r+2}, 0;\\n\\t'
            f'wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{args}}}, %{r}, %{r+1}, p, 1, 1, 0, {tb};\\n\\t}}" : {outs} : "l"(a), "l"(b), "r"(on)); }}')
def build(d, out):
    src = open("../../src/prelude.cu").read() + "".join(f"#define {k} {v}\n" for k, v in d.items()) + open("gemm_wgmma.cu").read().replace("\nMMA\n", "\n" + mma(d["BN"], d["TB"]) + "\n")
    p = ctypes.c_void_p()
    rtc.nvrtcCreateProgram(ctypes.byref(p), src.encode(), b"gemm_wgmma.cu", 0, None, None)
    opts = [b"--gpu-architecture=sm_90a", b"--ptxas-options=-v", b"--std=c++17"]
    rc = rtc.nvrtcCompileProgram(p, len(opts), (ctypes.c_char_p * len(opts))(*opts))
    n = ctypes.c_size_t(); rtc.nvrtcGetProgramLogSize(p, ctypes.byref(n)); b = ctypes.create_string_buffer(n.value); rtc.nvrtcGetProgramLog(p, b)
    log = b.value.decode()
    print({k: v for k, v in d.items()}, "rc", rc); print(log[-3000:])
    if rc == 0:
        rtc.nvrtcGetCUBINSize(p, ctypes.byref(n)); b = ctypes.create_string_buffer(n.value); rtc.nvrtcGetCUBIN(p, b); open(out, "wb").write(b.raw)
if __name__ == "__main__":
    base = dict(BM=128, BN=224, TB=0, STAGES=4, SHARE_A=0, SEGS=1, BLOCKS=1, B_BOX=112, OUT="bf16", SKEW=2, GROUP=16)
    for a in sys.argv[1:]:
        d = dict(base); d.update({k: (int(v) if v.lstrip("-").isdigit() else v) for k, v in (x.split("=") for x in a.split(",") if x)})
        build(d, f"out_{d['BM']}x{d['BN']}_{d['TB']}.cubin")

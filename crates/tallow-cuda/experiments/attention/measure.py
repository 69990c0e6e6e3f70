"""Times and checks the attention kernels on tensor cores one by one, as a training step of 0.5B calls them: batch 8, 512 causal
queries, 14 heads of 64 on 2, bf16. Needs PyTorch, nvcc and a Hopper card:

    python3 measure.py [FILE ...]

FILE: another attention_half.cu, to compare (with the attention_delta.cu beside it, if there is one there). Each kernel is launched
20 times in a CUDA graph; the least of eight replays counts. Errors are relative, in norm, against PyTorch in f32.
"""
import ctypes, math, os, re, subprocess, sys, tempfile, torch
SRC = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../src")
W = tempfile.mkdtemp()


def rd(name, beside=None):
    own = os.path.join(os.path.dirname(beside), name) if beside else ""
    path = own if beside and os.path.exists(own) else os.path.join(SRC, "glue", name)
    return open(path).read()


def text(half, fwd):
    d = dict(D=64, G="7u", SCALE="(0.125f)", CAUSAL=1, WINDOW="0u", STARTS=0, LANES=8, TQ="bf16", TK="bf16", TV="bf16", TO="bf16")
    d["FORWARD" if fwd else "BACKWARD"] = 1
    if not fwd:
        d.update(TG="bf16", DQ="bf16", DK="bf16", DV="bf16")
    beside = half if os.path.exists(half) else None
    t = open(os.path.join(SRC, "prelude.cu")).read() + "".join(f"#define {k} {v}\n" for k, v in d.items())
    t += rd("attention_common.cu") + ("" if fwd else rd("attention_delta.cu", beside))
    t += open(half).read() if beside else rd(half)
    return "\n".join(l for l in t.split("\n") if not l.startswith("//cap "))


V = [(f, fwd) for f in (sys.argv[1:] or ["attention_half.cu"]) for fwd in (1, 0)]
def build(i):
    f,fw=V[i]; p=f'{W}/{i}.cu'; open(p,'w').write(text(f,fw))
    r=subprocess.run(['nvcc','-cubin','-arch=sm_90a','-std=c++17','-Xptxas','-v','-o',f'{W}/{i}.cubin',p],capture_output=True,text=True)
    return r.stderr
logs=[build(i) for i in range(len(V))]
cu=ctypes.CDLL('libcuda.so.1')
# Six tiles, of which the forward kernel needs five, from a multiple of 1024 on.
sh=6*64*64*2+1024
torch.manual_seed(0); B,T,Hh,D,HK=8,512,14,64,2
dev='cuda'; qk=torch.randn(B,T,16,D,device=dev,dtype=torch.bfloat16); qkv=torch.randn(B,T,18,D,device=dev,dtype=torch.bfloat16)
go=torch.randn(B,T,Hh,D,device=dev,dtype=torch.bfloat16); q,k,v=qk[:,:,:14],qk[:,:,14:],qkv[:,:,16:]
pos=torch.arange(T,device=dev,dtype=torch.int32).repeat(B,1).contiguous()
def ref():
    a,b,c=[x.float().clone().requires_grad_() for x in (q,k,v)]
    kk=b.repeat_interleave(7,2);vv=c.repeat_interleave(7,2)
    s=torch.einsum('bihd,bjhd->bhij',a,kk)*0.125
    m=torch.triu(torch.ones(T,T,device=dev,dtype=torch.bool),1); s=s.masked_fill(m,-math.inf)
    o=torch.einsum('bhij,bjhd->bihd',s.softmax(-1),vv); o.backward(go.float())
    return o.detach(),torch.logsumexp(s,-1).detach(),a.grad,b.grad,c.grad
O,LSE,DQ,DK,DV=ref(); O16=O.bfloat16()
o=torch.empty_like(O16); lse=torch.empty(B,Hh,T,device=dev); delta=torch.empty(B,Hh,T,device=dev)
dq=torch.empty(B,T,Hh,D,device=dev,dtype=torch.bfloat16); dk=torch.empty(B,T,HK,D,device=dev,dtype=torch.bfloat16); dv=torch.empty_like(dk)
parts=torch.empty(2,B,Hh,T,D,device=dev)
def P_(t): return ctypes.c_uint64(t.data_ptr() if t is not None else 0)
U=ctypes.c_uint32
def st(t): return [U(t.stride(0)),U(t.stride(1)),U(t.stride(2))]
def fn(i,name):
    m=ctypes.c_void_p(); assert cu.cuModuleLoad(ctypes.byref(m),f'{W}/{i}.cubin'.encode())==0
    f=ctypes.c_void_p(); assert cu.cuModuleGetFunction(ctypes.byref(f),m,name.encode())==0; assert cu.cuFuncSetAttribute(f,8,sh)==0; return f
def launcher(f,grid,block,shared,args):
    arr=(ctypes.c_void_p*len(args))(*[ctypes.cast(ctypes.byref(a),ctypes.c_void_p) for a in args])
    def go_(): 
        r=cu.cuLaunchKernel(f,*grid,block,1,1,shared,ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),arr,None); assert r==0,r
    go_.keep=(args,arr); return go_
def time(f):
    g=torch.cuda.CUDAGraph(); f(); torch.cuda.synchronize()
    with torch.cuda.graph(g):
        for _ in range(20): f()
    g.replay(); best=1e9
    for _ in range(8):
        a,b=torch.cuda.Event(True),torch.cuda.Event(True); a.record(); g.replay(); b.record(); torch.cuda.synchronize(); best=min(best,a.elapsed_time(b)*50)
    return best
def err(a,b): return ((a.float()-b.float()).norm()/b.float().norm()).item()
for i,(n,fw) in enumerate(V):
    res=' '.join(f'{a}:{r}{"/spill"+sp if sp!="0" else ""}' for a,sp,r in re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers",logs[i],re.S))
    if not os.path.exists(f'{W}/{i}.cubin'): print(n,'FAILED',logs[i][:600]); continue
    try:
        if fw:
            l=launcher(fn(i,'attention'),(Hh,B,8),128,sh-8192,[P_(q),P_(k),P_(v),P_(pos),P_(None),P_(o),P_(lse),U(T),U(Hh),U(T)]+st(q)+st(k)+st(v)+st(o))
            o.zero_(); t=time(l); print(f'{n}: attention {t:.1f} us  err o {err(o,O):.4f} lse {err(lse,LSE):.6f} {res}')
        else:
            ld=launcher(fn(i,'delta'),(B*T*Hh//(16 if '/ LANES' in text(n,0) else 4),1,1),128,0,[P_(O16),P_(go),P_(delta),U(T),U(Hh),U(B*T*Hh)]+st(O16)+st(go))
            com=[P_(q),P_(k),P_(v),P_(pos),P_(None),P_(LSE),P_(go),P_(delta),U(T),U(Hh),U(T)]+st(q)+st(k)+st(v)+st(go)
            lq=launcher(fn(i,'grad_q'),(Hh,B,8),128,sh,com+[P_(dq)]+st(dq))
            lk=launcher(fn(i,'grad_kv'),(Hh,B,8),128,sh,com+[P_(parts)])
            n_=B*T*HK*D
            lj=launcher(fn(i,'join_kv'),(512,1,1),256,0,[P_(parts),P_(dk),P_(dv),U(n_),U(T),U(HK)]+st(dk)+st(dv))
            for x in (dq,dk,dv): x.zero_()
            ld();lq();lk();lj(); ts=[time(x) for x in (ld,lq,lk,lj)]
            print(f'{n}: us: delta {ts[0]:.1f} q {ts[1]:.1f} kv {ts[2]:.1f} join {ts[3]:.1f}  err {err(dq,DQ):.4f} {err(dk,DK):.4f} {err(dv,DV):.4f} {res}')
    except AssertionError as e: print(n,'ERR',e,res)

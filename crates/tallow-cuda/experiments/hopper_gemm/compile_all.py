"""Every cubin that `gemm_test --list` names, and the assembler's remarks: registers, spills, serialisation."""
import subprocess, sys, os, re, io, contextlib
from concurrent.futures import ProcessPoolExecutor
import compile as c
def one(line):
    conf, out = line.split()
    d = {k: (int(v) if v.isdigit() else v) for k, v in (x.split("=") for x in conf.split(","))}
    s = io.StringIO()
    with contextlib.redirect_stdout(s): c.build(d, out)
    log = s.getvalue()
    spill = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    regs = re.search(r"Used (\d+) registers", log)
    codes = sorted(set(re.findall(r"C75\d\d", log)))
    ok = spill and spill.groups() == ("0", "0", "0") and "C7510" not in codes and "C7508" not in codes
    return conf, ok, f"{'ok ' if ok else 'BAD'} regs {regs and regs[1]} stack/spill {spill and spill.groups()} {codes}", log
if __name__ == "__main__":
    lines = subprocess.run([sys.argv[1], "--list"], capture_output=True, text=True).stdout.split("\n")[:-1]
    os.makedirs("cubin", exist_ok=True)
    with ProcessPoolExecutor(2) as p:
        for conf, ok, say, log in p.map(one, lines):
            if not ok or "-v" in sys.argv: print(conf, say); 
            if not ok: print(log[-1500:])
        print(len(lines), "done")

#!/bin/bash
# Builds and runs gemm_test beside its cubins; arguments go to it (a part of a case's name).
cd "$(dirname "$0")" || exit 1
places="/usr/local /opt /usr/include /usr/lib $(python3 -c 'import site; print(" ".join(site.getsitepackages()))' 2>/dev/null)"
header=$(find $places -name cublasLt.h 2>/dev/null | head -1)
inc=${header:+$(dirname "$header")}
library=$(find $places -name 'libcublasLt.so.13*' 2>/dev/null | head -1)
[ -n "$library" ] || { echo "no libcublasLt.so.13"; exit 1; }
lib=$(dirname "$library")
nvcc=$(command -v nvcc || ls /usr/local/cuda*/bin/nvcc | head -1)
echo "nvcc $nvcc, headers $inc, cuBLASLt $lib"
mkdir -p /tmp/wg && ln -sf "$library" /tmp/wg/libcublasLt.so
"$nvcc" -arch=sm_90a -O3 -std=c++17 ${inc:+-I"$inc"} -Iinc gemm_test.cu -o /tmp/wg/gemm_test -L/tmp/wg -lcublasLt -ldl || exit 1
LD_LIBRARY_PATH="$lib:$LD_LIBRARY_PATH" timeout -s KILL 120 /tmp/wg/gemm_test "$@"
echo "rc $?"

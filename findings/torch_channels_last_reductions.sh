#!/bin/sh
# A network in channels_last is faster on a CPU. Are the reductions of its maps? Guess: a global maximum takes about as long as a global mean in either
# layout, and group normalisation with one channel a group at most twice as long in channels_last.
# Seen with PyTorch 2.14.1, one thread, 128 maps of 16 channels of 32 x 32: in channels_last the mean takes as long as in the usual layout, amax over the
# positions 11 times as long (5.5 to 0.5 ms; 50 times where the map is in the cache), of 64 channels of 8 x 8 not. Max pooling with the whole map as its window returns the same in
# 0.5 ms. Group normalisation of 64 channels of 8 x 8 in 64 groups takes six times as long as in the usual layout, in bfloat16 25 times.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6
OMP_NUM_THREADS=1 "$folder/env/bin/python" - <<'PY'
import statistics
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)


def seconds(f, *maps):
    "Median processor time for each map, alternating."
    times = []
    for _ in range(15):
        for x in maps:
            begin = time.process_time()
            f(x)
            times.append(time.process_time() - begin)
    return [statistics.median(times[i :: len(maps)][3:]) for i in range(len(maps))]


def ratio(name, f, *shape, dtype=torch.float32):
    usual = torch.randn(shape).to(dtype)
    last = usual.to(memory_format=torch.channels_last)
    assert torch.allclose(f(usual).float(), f(last).float(), atol=0.05)
    a, b = seconds(f, usual, last)
    print(f"{name:28} {shape} {str(dtype)[6:]:9} usual {1e3 * a:6.2f} ms, channels_last {1e3 * b:6.2f} ms: {b / a:.1f}")
    return b / a, b


maximum = lambda x: x.amax((2, 3), keepdim=True)
pooled = lambda x: F.max_pool2d(x, x.shape[2:])
mean = lambda x: x.mean((2, 3), keepdim=True)
norm = lambda x: F.group_norm(x, x.shape[1])
print("torch", torch.__version__)
assert ratio("mean", mean, 128, 16, 32, 32)[0] < 4
times, slow = ratio("amax", maximum, 128, 16, 32, 32)
assert times > 5
assert ratio("amax", maximum, 128, 64, 8, 8)[0] < 4
assert slow > 4 * ratio("max_pool2d of the whole map", pooled, 128, 16, 32, 32)[1]
assert ratio("group_norm, a channel each", norm, 128, 64, 8, 8)[0] > 2
assert ratio("group_norm, a channel each", norm, 128, 64, 8, 8, dtype=torch.bfloat16)[0] > 8
PY

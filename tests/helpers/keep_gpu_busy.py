"""Another process's work, so that the GPU is shared out in slices of time: `keep_gpu_busy.py`, until it is killed."""

import torch

if __name__ == "__main__":
    numbers = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    print("busy", flush=True)
    while True:
        for _ in range(20):
            numbers @ numbers
        torch.cuda.synchronize()

"""What torch 2.13 writes, for tests that have no torch: python tests/data/make_torch_files.py FOLDER"""

import argparse
import sys

import numpy as np
import torch

torch.manual_seed(0)
base = torch.randn(20)
state = {
    "float32": torch.randn(3, 4),
    "float16": torch.randn(5).half(),
    "bfloat16": torch.randn(2, 3).bfloat16(),
    "float64": torch.randn(2).double(),
    "int64": torch.arange(4),
    "bool": torch.tensor([True, False]),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "sliced": base[5:15:3],
    "shared": base[:2],
    "expanded": torch.ones(3, 1).expand(3, 5),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}
norm = torch.nn.LayerNorm(3)
optimizer = torch.optim.AdamW(norm.parameters())
norm(torch.randn(2, 3)).sum().backward()
optimizer.step()
content = {
    "model": state,
    "optimizer": optimizer.state_dict(),
    "args": argparse.Namespace(lr=1e-3, betas=(0.9, 0.999), name="x", none=None),
    "epoch": 3,
    "size": torch.Size([1, 2]),
    "ordered": norm.state_dict(),
    "flags": {1, 2},
}
folder = sys.argv[1]
torch.save(content, f"{folder}/torch_zip.pth")
torch.save(content, f"{folder}/torch_legacy.pth", _use_new_zipfile_serialization=False)
torch.save(content, f"{folder}/torch_protocol4.pth", pickle_protocol=4)
np.savez(f"{folder}/torch_values.npz", **{name: x.detach().float().numpy() for name, x in state.items()})

#!/bin/sh
# grad-cam 1.5.7 at a batch normalisation of torchvision's ResNet. Guess: it keeps the output of the layer. Seen with torch
# 2.14.1 on a CPU: what it keeps is the output of the ReLU that follows, because .cpu().detach() copies nothing there and the ReLU
# works in place; on a GPU .cpu() copies. The gradient is that of the layer itself, so the map mixes two layers: in a network
# whose map is known, the one that comes out is another.
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 grad-cam==1.5.7
"$folder/env/bin/python" - <<'PYTHON'
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torchvision.models import resnet18

torch.manual_seed(0)
network, x = resnet18().eval(), torch.randn(1, 3, 64, 64)
layer, seen = network.layer4[1].bn1, {}
layer.register_forward_hook(lambda _, __, y: seen.update(own=y.detach().clone()))
with GradCAM(network, [layer]) as cam:
    cam(x, [ClassifierOutputTarget(0)])
    kept = cam.activations_and_grads.activations[0]
print("negative values: of the layer", int((seen["own"] < 0).sum()), "in what grad-cam keeps", int((kept < 0).sum()))
assert (seen["own"] < 0).any() and torch.equal(kept, seen["own"].relu())
PYTHON

"""The yardstick: one FFL training step in plain PyTorch, timed as `python -m ffl_jax.bench` times ours.

    python benchmarks/pytorch_ffl.py [--batch_size=128] [--depth=32] [--wide] [--num=2] [--device=cpu]
                                     [--compile] [--bfloat16] [--channels_last] [--json=FILE]

The same networks (K ResNets for CIFAR, or with --wide WRNs of width 2, that share all but their last stage),
fusion module, losses and SGD as `configs/cifar100.py`; one batch of random images stays on the device. Needs
torch, which ffl_jax does not.
"""

import argparse
import copy
import functools
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    def __init__(self, channels, features, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)
        self.shortcut = nn.Identity()
        if stride != 1 or channels != features:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, features, 1, stride, bias=False), nn.BatchNorm2d(features)
            )

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class PreActivationBlock(nn.Module):
    def __init__(self, channels, features, stride):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, features, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, stride, 1)
        self.shortcut = nn.Identity()
        if stride != 1 or channels != features:
            self.shortcut = nn.Conv2d(channels, features, 1, stride)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(y))) + self.shortcut(x)


def stage(block, blocks, channels, features, stride):
    first = block(channels, features, stride)
    return nn.Sequential(first, *(block(features, features, 1) for _ in range(blocks - 1)))


class FFL(nn.Module):
    def __init__(self, depth, wide, num, classes):
        super().__init__()
        if wide:
            make = functools.partial(stage, PreActivationBlock, (depth - 4) // 6)
            stem, (first, second, last) = nn.Conv2d(3, 16, 3, 1, 1), (32, 64, 128)
            end = (nn.BatchNorm2d(last), nn.ReLU())
        else:
            make = functools.partial(stage, BasicBlock, (depth - 2) // 6)
            stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
            (first, second, last), end = (16, 32, 64), ()
        self.trunk = nn.Sequential(stem, make(16, first, 1), make(first, second, 2))
        self.branches = nn.ModuleList(
            nn.Sequential(make(second, last, 2), *copy.deepcopy(end)) for _ in range(num)
        )
        self.heads = nn.ModuleList(nn.Linear(last, classes) for _ in range(num))
        wide = last * num
        self.fusion = nn.Sequential(
            nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, last, 1, bias=False),
            nn.BatchNorm2d(last),
            nn.ReLU(),
        )
        self.fused_head = nn.Linear(last, classes)

    def forward(self, images):
        shared = self.trunk(images)
        maps = [branch(shared) for branch in self.branches]
        logits = [head(x.mean((2, 3))) for head, x in zip(self.heads, maps, strict=True)]
        return logits, self.fused_head(self.fusion(torch.cat(maps, 1)).mean((2, 3)))


def distillation(learner, target, temperature=3.0):
    target = (target.detach() / temperature).log_softmax(1)
    learner = (learner / temperature).log_softmax(1)
    return F.kl_div(learner, target, reduction="batchmean", log_target=True) * temperature**2


def loss(logits, fused, labels, weight=0.5):
    cross_entropy = sum(F.cross_entropy(x, labels) for x in (*logits, fused))
    knowledge = sum(distillation(x, fused) for x in logits) + distillation(fused, sum(logits) / len(logits))
    return cross_entropy + weight * knowledge


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--wide", action="store_true", help="a pre-activation wide ResNet of width 2")
    parser.add_argument("--num", type=int, default=2)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks, of which the median counts")
    parser.add_argument("--steps", type=int, default=5, help="steps in a block")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--bfloat16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--json", help="a file for what is printed")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    model = FFL(arguments.depth, arguments.wide, arguments.num, arguments.classes)
    model = model.to(device, memory_format=layout)
    images = torch.randn(arguments.batch_size, 3, 32, 32, device=device).to(memory_format=layout)
    labels = torch.randint(arguments.classes, (arguments.batch_size,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def forward(images, labels):
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bfloat16):
            logits, fused = model(images)
        return loss([x.float() for x in logits], fused.float(), labels)

    forward = torch.compile(forward) if arguments.compile else forward

    def block():
        start = time.perf_counter()
        for _ in range(arguments.steps):
            optimizer.zero_grad(set_to_none=True)
            value = forward(images, labels)
            value.backward()
            optimizer.step()
        value.item()  # waits for the device
        return (time.perf_counter() - start) / arguments.steps

    first = block()
    seconds = statistics.median(block() for _ in range(arguments.blocks))
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    found = {
        "program": "PyTorch " + torch.__version__ + (" compiled" if arguments.compile else " eager"),
        "device": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": "bfloat16" if arguments.bfloat16 else "float32",
        "batch_size": arguments.batch_size,
        "first_block_seconds_a_step": round(first, 4),
        "seconds_a_step": round(seconds, 5),
        "images_per_second": round(arguments.batch_size / seconds, 1),
    }
    print(json.dumps(found))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main()

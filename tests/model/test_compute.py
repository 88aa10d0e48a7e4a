import dataclasses
import os
import platform
import subprocess
import sys

import pytest
import torch

from ftexp import model, passes
from ftexp.config import Attention, Dtype, Kind, Model, Quant
from ftexp.errors import MachineError
from ftexp.model import compute


@pytest.mark.parametrize(
    ("seconds", "error", "dtype", "kernel"),
    [
        ({"default": 1.0, "onednn": 0.5}, 4e-7, "float32", "onednn"),
        ({"default": 1.0, "onednn": 0.5}, 1e-3, "float32", "default"),  # faster because it rounds
        ({"default": 1.0, "onednn": 0.9}, 4e-7, "float32", "default"),  # not clearly faster
        ({"default": 1.0, "onednn": 1.0, "bfloat16": 0.4}, 4e-7, "bfloat16", "default"),
        ({"default": 1.0, "onednn": 0.5, "bfloat16": 0.45}, 4e-7, "float32", "onednn"),
        ({"default": 1.0, "onednn": 1.0, "bfloat16": 80.0}, 4e-7, "float32", "default"),
    ],
)
def test_choice_follows_clear_gains_without_rounding(seconds, error, dtype, kernel):
    chosen = compute.choose(seconds, error)
    assert (chosen.dtype, chosen.kernel) == (dtype, kernel)


def test_probe_leaves_the_kernel_flag_and_the_generator_alone():
    import torch

    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    before = torch.backends.mkldnn.matmul.fp32_precision
    probe = compute.measure()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert torch.rand(1) == expected
    assert set(probe.seconds) >= {"default", "onednn"}


def test_choice_is_kept_so_that_a_second_process_computes_alike(monkeypatch, tmp_path):
    monkeypatch.setenv("FTEXP_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    first = compute.policy(Model())
    monkeypatch.setattr(compute, "measure", lambda: pytest.fail("probed again"))
    assert compute.policy(Model()) == first


def test_config_wins_over_the_probe(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    chosen = compute.policy(Model(dtype=Dtype.bfloat16, attention=Attention.sdpa))
    assert (chosen.dtype, chosen.attention) == ("bfloat16", "sdpa")


def test_long_rows_get_attention_whose_memory_does_not_grow_with_their_square(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert compute.policy(Model(), compute.LONG - 1).attention == "eager"
    assert compute.policy(Model(), compute.LONG).attention == "sdpa"
    assert compute.policy(Model(attention=Attention.eager), compute.LONG).attention == "eager"


def test_both_attentions_give_the_same_loss_and_the_base_is_another():
    import torch

    from ftexp import model
    from ftexp.config import Kind, Quant

    ids = torch.arange(64)[None] % 250
    losses, keys = [], []
    for longest in (64, compute.LONG):
        base = model.load(Model(kind=Kind.tiny, dtype=Dtype.float32), Quant(), longest=longest)
        assert base.model.config._attn_implementation == base.compute.attention
        losses.append(base.model(input_ids=ids, labels=ids).loss.item())
        keys.append(base.key)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert keys[0] != keys[1]


FAULTS = """
import resource, sys, torch
from ftexp.errors import MachineError
from ftexp.model import compute
if "keep" in sys.argv:
    compute.keep_pages()
for _ in range(3):
    torch.ones(2**24)  # 64 MiB; aligned blocks take two rounds until one fits into what is free
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory of glibc; run it where Python is linked with it")
@pytest.mark.parametrize(
    ("given", "env", "most"),
    [("keep", {}, 4000), ("", {}, None), ("keep", {"MALLOC_TRIM_THRESHOLD_": "131072"}, None)],
    ids=["kept", "sabotage: not asked", "a person's own setting"],
)
def test_freed_memory_is_used_again(given, env, most):
    """Five times 64 MiB are 82,000 pages of 4 KiB, of which none is new."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", FAULTS, given], env=own | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = int(done.stdout)
    assert pages > 50_000 if most is None else pages < most


def test_pages_are_kept_where_the_cpu_computes(monkeypatch):
    asked = []
    monkeypatch.setattr(compute, "keep_pages", lambda: asked.append(1))
    chosen = compute.policy(Model())
    compute.apply(dataclasses.replace(chosen, device="cuda"))
    assert asked == []
    compute.apply(dataclasses.replace(chosen, device="cpu"))
    assert asked == [1]


def test_memory_is_given_back_before_another_model_is_loaded_and_after_it_ran_out(monkeypatch):
    asked, counts = [], []
    model.load(Model(kind=Kind.tiny, dtype=Dtype.bfloat16), Quant())
    monkeypatch.setattr(compute, "give_back_pages", lambda: asked.append(1))
    for dtype in (Dtype.float32, Dtype.float32, Dtype.bfloat16, None, Dtype.bfloat16):
        if dtype is None:
            model.forget()
            continue
        model.load(Model(kind=Kind.tiny, dtype=dtype), Quant())
        counts.append(len(asked))
    assert counts == [1, 1, 2, 3]
    passes.free_memory()
    assert len(asked) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is meant")
def test_named_gpus_that_are_not_there_are_told(monkeypatch):
    """A worker of a broken node would train on the CPU, a hundred times as slow, and nobody would know."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(MachineError, match=r"CUDA_VISIBLE_DEVICES=0,1 names GPUs and PyTorch .* sees none"):
        compute.policy(Model())
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert compute.policy(Model()).device == "cpu"


@pytest.mark.parametrize(("cores", "asked", "threads"), [(1, None, 1), (8, None, 2), (1, "2", 2)])
def test_threads_keep_to_the_quota_of_a_container(monkeypatch, cores, asked, threads):
    """Also those of a run that no supervisor started."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(compute.machine, "cores", lambda: cores)
    monkeypatch.setattr(compute, "_cpu_choice", lambda chip: ("float32", "default"))
    torch.set_num_threads(2)
    try:
        told = compute.policy(Model())
        assert (told.threads, torch.get_num_threads()) == (threads, threads)
    finally:
        torch.set_num_threads(before)

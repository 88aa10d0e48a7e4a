"""Command lines a person may give by mistake; each must be refused in one line, before torch is imported.

The messages are in `configs.txt`. Run this file to write that one anew, and read the difference before it is
committed. With `--json` it prints what each gave, and whether torch was imported or a file written.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

CASES = """
lora.r=0
lora.r=5000
lora.r=2.5
lora.r=eight
lora.r=null
lora.alpha=0
lora.alpha=nan
lora.alpha=1e9
lora.dropout=1
lora.targets=[]
lora.targets=[q_proj,q_proj]
lora.targets=[all-linear,q_proj]
lora.variant=qlora
lora=qlora
'lora=glob(*)' -m
trainer.lr=0
trainer.lr=2
trainer.lr=1e-400
trainer.lr=inf
trainer.steps=0
trainer.steps=1000000000000
trainer.epochs=0
trainer.batch=0
trainer.batch=1000000
trainer.accumulation=0
trainer.warmup=100
trainer.weight_decay=-1
trainer.max_grad_norm=-1
trainer.neftune=1e9
trainer.report_steps=-1
trainer.checkpoint_minutes=-1
trainer.scheduler=cosin
trainer.scheduler=constant trainer.warmup=0.1
trainer.multi_label=false
trainer.class_weights=true
trainer.kind=classify trainer.group_by_length=true
trainer.kind=classify data.packing=bfd
trainer.kind=classify eval.forgetting=python-docs
trainer.optimizer=
data.max_length=4
data.valid=0
data.valid=1.5
data.valid=100000
data.test=-1
data.test=0.99
data.rows=1
data.seed=-1
data.dedup_threshold=0
data.shuffle=false data.group_by=author
data.group_by=nope
data.path=x.jsonl
data.split=test
data.revision=main
data=jsonl
data=jsonl data.path=nope.jsonl
data=jsonl data.path=.
data=jsonl data.path=rows.jsonl data.valid_path=rows.jsonl
data=jsonl data.path=rows.jsonl data.valid=10 data.test=20
data=jsonl data.path=rows.jsonl data.valid=4 data.columns.prompt=nope
data=jsonl data.path=rows.jsonl data.valid=4 data.shape=messages
data=jsonl data.path=rows.jsonl data.valid=4 data.prompt={nope}
data=jsonl data.path=rows.jsonl data.prompt=hello
data=jsonl data.path=rows.jsonl data.prompt={prompt.__class__}
data=hub
data=hub data.path=a/b data.split=
data.packing=bfd trainer.group_by_length=true
data.allow=[everything]
data=nope
model=hub
model=hub model.path=./nope
model=tiny model.path=x
model=tiny quant=nf4
model.revision=main
model.dtype=float8
model=run
model=run model.path=nope
model=run model.path=x model.revision=main
trainer=rloo
trainer=rloo trainer.reward=nope
trainer=rloo trainer.reward=nope trainer.generations=1
trainer=rloo trainer.reward=nope trainer.batch=6
trainer=rloo trainer.reward=nope trainer.max_new_tokens=0
trainer=rloo trainer.reward=nope trainer.neftune=5
trainer=rloo trainer.reward=nope lora.dropout=0.1
trainer=rloo trainer.reward=nope eval=loss
trainer=rloo trainer.reward=nope data.packing=bfd
trainer=rloo trainer.reward=nope objectives=[valid/accuracy]
trainer.reward=x
trainer.generations=8
quant=int4
quant=int8 quant.double=true
eval.batch=0
eval.max_new_tokens=0
eval.examples=-1
eval.labels=
eval=loss eval.labels=|
eval=loss objectives=[valid/exact_match]
eval.forgetting=nope.txt
objectives=[]
objectives=[valid/lsos]
objectives=[valid/loss,valid/loss]
objectives=[forgetting/loss]
seed=-1
seed=1.5
name=../../x
name=/etc/x
track.uri=
track.uri=ftp://x
track.uri=sqlite:///
track=wandb
lora.rank=8
+lora.rank=8
~lora.r
lora.r
+model._target_=os.system
trainer.extra.hub_token=x
'lora.r=${nope}'
'lora.r=${oc.env:NOPE}'
'lora.alpha=${lora.alpha}'
'lora.alpha=${mul:2,x}'
lora.r=8,16
lora.r=8,0 -m
'lora.r=range(8,4)' -m
'lora.r=interval(1,8)' -m
'lora.r=interval(8,1)' sweep.sampler=tpe sweep.n_trials=2
'trainer.lr=tag(log,interval(0,1))' sweep.sampler=tpe sweep.n_trials=2
'lora.r=interval(0,8)' sweep.sampler=tpe sweep.n_trials=2
sweep.sampler=tpe lora.r=2,4
sweep.sampler=cmaes lora.r=2,4
sweep.sampler=tpe sweep.n_trials=4
sweep.n_trials=4 lora.r=2,4
sweep.replicates=0 lora.r=2,4
sweep.workers=-1 lora.r=2,4
sweep.timeout_minutes=nan lora.r=2,4
sweep.storage=sqlite:///x.db sweep.workers=2 lora.r=2,4
sweep.storage=nope lora.r=2,4
sweep.pruner=asha trainer.report_steps=0 lora.r=2,4
sweep.pruner=asha objectives=[valid/loss,cost/seconds] lora.r=2,4
sweep.at_most.cost/trainable=9000 lora.r=2,4
'sweep.at_most={cost/nope: 9}' lora.r=2,4
'sweep.at_most={cost/trainable: many}' lora.r=2,4
'sweep.at_most={cost/trainable: nan}' lora.r=2,4
'sweep.baselines=[{lora.r: 3}]' lora.r=2,4 sweep.sampler=tpe sweep.n_trials=2
'sweep.baselines=[{seed: 3}]' lora.r=2,4 sweep.sampler=tpe sweep.n_trials=2
'sweep.baselines=[{lora.r: 4}]' lora.r=2,4
sweep.baselines=[3] lora.r=2,4
sweep.nope=1 lora.r=2,4
sweep=nope
name=a,b -m
seed=0,1 sweep.replicates=2
lora.r=2,4 seed=4294967295 sweep.replicates=2
hydra/sweeper=basic -m
hydra.nope=1
hydra.sweeper._target_=os.system lora.r=2,4
hydra.mode=MULTIRUN
+hydra.callbacks.x._target_=os.system
"""
"""One command line each, as a shell takes it."""


def cases() -> list[str]:
    return CASES.split("\n")[1:-1]


def told(line: str) -> dict[str, object]:
    """Run a command line in an empty folder with thirty rows: exit code, message, what was imported or written."""
    from ftexp import experiment, progress
    from ftexp import run as command
    from ftexp.sweep import plugin

    def accepted(*_: object) -> None:
        raise AssertionError("accepted")

    experiment.prepare = plugin.launch = accepted  # type: ignore
    rows = [{"prompt": f"p{n} {n * n}", "completion": f"c{n}"} for n in range(30)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as err:
        os.chdir(folder)
        Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        progress.console.file = err
        sys.argv = ["ftexp.run", *shlex.split(line)]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                code: object = command.main()
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
        written = sorted({*os.listdir()} - {"rows.jsonl"})
        os.chdir("/")
    return {"code": code, "message": err.getvalue().strip(), "torch": "torch" in sys.modules, "written": written}


if __name__ == "__main__":
    wanted, here = "--json" in sys.argv, Path(__file__).resolve().parent
    found = {line: told(line) for line in cases()}
    if wanted:
        print(json.dumps(found))
    else:
        text = "".join(f"{line} -> {one['message'].removeprefix('ftexp: ')}\n" for line, one in found.items())  # type: ignore
        (here / "configs.txt").write_text(text)

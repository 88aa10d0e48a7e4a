import math
from contextlib import suppress

import pytest

from ftexp import config
from ftexp.config import Data, Lora, Model, Quant, Run, Trainer
from ftexp.errors import ConfigError

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lora.r=0", r"lora\.r must be a rank between 1 and 4096, got 0"),
        ("lora.r=-1", r"lora\.r must be .*, got -1"),
        ("lora.alpha=0", r"lora\.alpha must be above 0 .*, got 0\.0"),
        ("lora.alpha=nan", r"lora\.alpha must be a finite number, got nan"),
        ("lora.dropout=1", r"lora\.dropout must be a share in \[0, 1\), got 1\.0"),
        ("lora.targets=[]", r"lora\.targets must be a list of at least one"),
        ("trainer.lr=nan", r"trainer\.lr must be a finite number, got nan"),
        ("trainer.lr=inf", r"trainer\.lr must be a finite number, got inf"),
        ("trainer.lr=0", r"trainer\.lr must be above 0 and at most 1, got 0\.0"),
        ("trainer.lr=1e-400", r"trainer\.lr must be above 0"),
        ("trainer.steps=0", r"trainer\.steps must be null or at least 1, got 0"),
        ("trainer.steps=2000000000", r"trainer\.steps must be at most 1000000000"),
        ("trainer.optimizer=''", r"trainer\.optimizer must be the name of an optimizer in transformers"),
        ("lora.targets=[a,a]", r"lora\.targets must be names of layers, each once"),
        ("lora.targets=[all-linear,a]", r"lora\.targets must be \[all-linear\] alone"),
        ("model.revision=main", r"model\.revision must be null when model=embedded"),
        ("data.seed=-1", r"data\.seed must be between 0"),
        ("track.uri=ftp://x", r"track\.uri must be an address that begins with sqlite"),
        ("objectives=[valid/loss,valid/loss]", r"objectives must be metrics, each once"),
        ("track.uri=http://me:pw@host", r"track\.uri must not hold a user or password: configs are written"),
        ("track.experiment=hf_abcdefghijklmnopqrstuvwx", r"track\.experiment must not hold an access key"),
        ("trainer.epochs=-1", r"trainer\.epochs must be above 0"),
        ("trainer.batch=0", r"trainer\.batch must be between 1 and 65536"),
        ("trainer.accumulation=0", r"trainer\.accumulation must be"),
        ("trainer.warmup=1", r"trainer\.warmup must be a share"),
        ("trainer.weight_decay=-1", r"trainer\.weight_decay must be in \[0, 1\]"),
        ("trainer.max_grad_norm=-1", r"trainer\.max_grad_norm must be 0 or more"),
        ("trainer.neftune=-5", r"trainer\.neftune must be in \[0, 100\]"),
        ("trainer.neftune=1e9", r"trainer\.neftune must be in \[0, 100\]"),
        ("trainer.report_steps=-1", r"trainer\.report_steps must be 0 or more"),
        (
            "trainer.scheduler=constant trainer.warmup=0.05",
            r"trainer\.warmup must be 0 with trainer\.scheduler=constant, got 0\.05",
        ),
        ("trainer.multi_label=false", r"trainer\.multi_label must be true unless trainer\.kind=classify"),
        ("trainer.class_weights=true", r"trainer\.class_weights must be false unless trainer\.kind=classify"),
        (
            "trainer.loss=dft trainer.kind=dpo",
            r"trainer\.loss must be nll with trainer\.kind=dpo, which has .*, got 'dft'",
        ),
        (
            "trainer.loss_strength=1",
            r"trainer\.loss_strength must be null unless trainer\.loss is one of focal, .*, got 1",
        ),
        (
            "trainer.loss=focal trainer.loss_strength=11",
            r"trainer\.loss_strength must be null or between 0 and 10 with",
        ),
        ("trainer.loss=z_loss trainer.loss_strength=nan", r"trainer\.loss_strength must be a finite number"),
        ("trainer.loss=own", r"trainer\.loss_sha256 must be left to ftexp\.api\.run\(loss=function\), got ''"),
        ("trainer.loss_sha256=ab", r"trainer\.loss_sha256 must be empty unless trainer\.loss=own, got 'ab'"),
        ("trainer.beta=0 trainer.kind=dpo", r"trainer\.beta must be above 0 and at most 100, got 0\.0"),
        ("trainer.beta=0.2", r"trainer\.beta must be left out unless trainer\.kind=dpo or rloo, got 0\.2"),
        ("trainer.reward=x", r"trainer\.reward must be left out unless trainer\.kind=rloo, got 'x'"),
        ("trainer.generations=8", r"trainer\.generations must be left out unless trainer\.kind=rloo, got 8"),
        ("trainer.max_new_tokens=8", r"trainer\.max_new_tokens must be left out unless trainer\.kind=rloo, got 8"),
        ("trainer=rloo", r"trainer\.reward must be folder, name or id of a run of trainer=reward, got ''"),
        (
            "trainer=rloo trainer.reward=x trainer.generations=1",
            r"trainer\.generations must be between 2 and 1024, got 1",
        ),
        (
            "trainer=rloo trainer.reward=x trainer.max_new_tokens=0",
            r"trainer\.max_new_tokens must be null or between 1",
        ),
        (
            "trainer=rloo trainer.reward=x trainer.batch=6",
            r"trainer\.generations must be a divisor of .* = 6: .*, got 4",
        ),
        ("trainer=rloo trainer.reward=x trainer.beta=-1", r"trainer\.beta must be above 0 and at most 100, got -1\.0"),
        (
            "trainer=rloo trainer.reward=x trainer.neftune=5",
            r"trainer\.neftune must be 0 with trainer\.kind=rloo, got 5",
        ),
        (
            "trainer=rloo trainer.reward=x lora.dropout=0.1",
            r"lora\.dropout must be 0 with trainer\.kind=rloo.*, got 0\.1",
        ),
        ("trainer=rloo trainer.reward=x eval.generate=false", r"eval\.generate must be true with trainer\.kind=rloo"),
        ("model=run", r"model\.path must be folder, name or id of a run when model=run, got ''"),
        ("model=run model.path=x model.revision=main", r"model\.revision must be null when model=run, got 'main'"),
        (
            "trainer.engine=packed lora=dora",
            r"lora\.variant must be lora or rslora with trainer\.engine=packed, got 'dora'",
        ),
        ("trainer.engine=packed lora=pissa", r"lora\.variant must be lora or rslora with trainer\.engine=packed"),
        ("trainer.engine=packed lora=none", r"lora\.variant must be lora or rslora with trainer\.engine=packed"),
        ("trainer.engine=packed lora=loraplus", r"lora\.lr_ratio must be 1 with trainer\.engine=packed, got 16"),
        (
            "trainer.engine=packed ++lora.extra.modules_to_save=[lm_head]",
            r"lora\.extra must be empty with trainer\.engine",
        ),
        ("trainer.engine=packed data.packing=bfd", r"data\.packing must be none with trainer\.engine=packed"),
        ("trainer.engine=packed data.packing=wrapped", r"data\.packing must be none with trainer\.engine=packed"),
        (
            "trainer.engine=packed trainer.group_by_length=true",
            r"trainer\.group_by_length must be false with trainer\.eng",
        ),
        ("trainer.engine=packed trainer.gradient_checkpointing=true", r"trainer\.gradient_checkpointing must be false"),
        (
            "trainer.engine=packed trainer.optimizer=sgd",
            r"trainer\.optimizer must be adamw_torch_fused or adamw_torch w",
        ),
        ("trainer.engine=packed trainer.loss=dft", r"trainer\.loss must be nll with trainer\.engine=packed, got 'dft'"),
        (
            "trainer.engine=packed ++trainer.extra.adam_beta1=0.8",
            r"trainer\.extra must be empty with trainer\.engine=packed",
        ),
        ("trainer.kind=dpo trainer.engine=packed", r"trainer\.kind must be sft with trainer\.engine=packed, got 'dpo'"),
        ("trainer.kind=reward trainer.group_by_length=true", r"trainer\.group_by_length must be false with"),
        ("trainer.kind=dpo trainer.class_weights=true", r"trainer\.class_weights must be false unless"),
        ("lora.lr_ratio=0.5", r"lora\.lr_ratio must be between 1 and 1000, got 0\.5"),
        ("lora.train=[layer.4]", r"lora\.train must be empty unless lora\.variant=none"),
        ("lora=none lora.train=['']", r"lora\.train must be a list of parts"),
        ("lora=none lora.dropout=0.1", r"lora\.dropout must be left out with lora\.variant=none.*, got 0\.1"),
        ("lora=none lora.lr_ratio=4", r"lora\.lr_ratio must be left out with lora\.variant=none"),
        ("lora=none lora.targets=[q_proj]", r"lora\.targets must be left out with lora\.variant=none"),
        ("lora=none quant=nf4", r"quant\.kind must be none with lora\.variant=none.*, got 'nf4'"),
        ("lora=loftq", r"quant\.kind must be nf4 with lora\.variant=loftq.*, got 'none'"),
        ("lora=loftq quant=int8", r"quant\.kind must be nf4 with lora\.variant=loftq.*, got 'int8'"),
        ("lora=pissa quant=int8", r"quant\.kind must be none with lora\.variant=pissa"),
        ("lora.variant=none", r"model\.dtype must be float32 .*with lora\.variant=none, got 'auto'"),
        ("lora=none model.dtype=float16", r"model\.dtype must be float32 .*, got 'float16'"),
        ("data.max_length=1", r"data\.max_length must be between 8"),
        ("data.valid=0", r"data\.valid must be at least 1"),
        ("data.test=-1", r"data\.test must be 0 or more"),
        ("data.valid=1.5", r"data\.valid must be at least 1, or a share below 1.*, got 1\.5"),
        ("data.valid=nan", r"data\.valid must be a finite number"),
        ("data.valid=-0.1", r"data\.valid must be at least 1"),
        ("data.test=2.0", r"data\.test must be 0 or more"),
        ("data.valid_path=x.csv", r"data\.valid_path must be empty when data=yoda \(use data=file\), got 'x\.csv'"),
        ("data=csv data.path=''", r"data\.path must be a file when data=csv"),
        ("data=hub data.path=''", r"data\.path must be an id of the hub or a folder when data=hub"),
        ("data=hub data.path=a/b data.split=''", r"data\.split must be the name of a split"),
        ("data=hub data.path=a/b data.valid_path=x", r"data\.valid_path must be empty when data=hub"),
        ("data.revision=main", r"data\.revision must be left out when data=yoda \(use data=hub\), got 'main'"),
        ("data=csv data.path=x data.split=test", r"data\.split must be left out when data=csv"),
        ("trainer.kind=classify trainer.group_by_length=true", r"trainer\.group_by_length must be false with"),
        ("data.dedup_threshold=0", r"data\.dedup_threshold must be above 0 and at most 1"),
        (
            "data.shuffle=false data.group_by=author",
            r"data\.group_by must be null when data\.shuffle=false, got 'author'",
        ),
        ("data.shuffle=false data.stratify_by=a", r"data\.stratify_by must be null when data\.shuffle=false"),
        ("data.rows=1", r"data\.rows must be null or at least 2"),
        ("data.path=x.jsonl", r"data\.path must be empty when data=yoda"),
        ("data=jsonl data.path=''", r"data\.path must be a file when data=jsonl"),
        ("data.prompt='no column'", r"data\.prompt must be a format string"),
        ("data.prompt='{a.b}'", r"data\.prompt must be a format string"),
        ("data.prompt='{a!r:>9}'", r"data\.prompt must be a format string"),
        ("eval.batch=0", r"eval\.batch must be between 1"),
        ("eval.max_new_tokens=0", r"eval\.max_new_tokens must be null or between 1"),
        ("eval.forgetting=''", r"eval\.forgetting must be null, python-docs or a text file"),
        ("eval.labels=''", r"eval\.labels must be null or what stands between labels"),
        ("eval=loss eval.labels='|'", r"eval\.labels='\|' needs eval\.generate=true"),
        ("eval.examples=-1", r"eval\.examples must be 0 or more"),
        ("model=hub model.path=''", r"model\.path must be a hub id or a folder when model=hub"),
        ("model=tiny model.path=x", r"model\.path must be empty when model=tiny"),
        ("quant.double=true", r"quant\.double must be false unless quant=nf4"),
        ("seed=-1", r"seed must be between 0"),
        ("objectives=[]", r"objectives must be a list"),
        ("name=../../etc", r"name must be 1 to 64 letters"),
        ("+trainer.extra.hub_token=abc", r"trainer\.extra\.hub_token must not be set"),
        ("+lora.extra.api_key=abc", r"lora\.extra\.api_key must not be set"),
        ("+lora.dropuot=0.1", r"unknown key lora\.dropuot"),
    ],
)
def test_bad_value_is_refused_with_key_rule_and_value(composed, given, message):
    with pytest.raises(ConfigError, match=message):
        composed(*given.split(" ") if "data.prompt" not in given else [given])


def test_format_string_and_another_shape_are_at_odds():
    with pytest.raises(ConfigError, match=r"data\.shape must be completion where data\.prompt is given, got 'text'"):
        Data(shape=config.Shape.text, prompt="{a}")
    with pytest.raises(ConfigError, match=r"data\.shape must be completion or text where data\.completion is given"):
        Data(shape=config.Shape.labels, completion="{a}")
    assert Data(shape=config.Shape.text, completion="{a}").completion == "{a}"


def test_shares_counts_columns_and_gates_compose(composed):
    data = composed("data.valid=0.1", "data.test=5", "++data.columns.text=plot", "data.allow=[leaks,lost]").data
    assert (data.valid, data.test, data.columns) == (0.1, 5, {"text": "plot"})
    assert data.allow == [config.Gate.leaks, config.Gate.lost]


def test_default_alpha_follows_rank(composed):
    assert [composed(f"lora.r={r}").lora.alpha for r in (8, 64)] == [16, 128]
    assert composed("lora.r=8", "lora.alpha=5").lora.alpha == 5


def test_training_without_an_adapter_takes_float32(composed):
    assert composed("lora=none").model.dtype is config.Dtype.float32
    assert composed("lora=none", "model.dtype=bfloat16").model.dtype is config.Dtype.bfloat16
    assert composed("lora=default").model.dtype is config.Dtype.auto


def test_missing_path_names_its_key(composed):
    with pytest.raises(ConfigError, match=r"model\.path"):
        composed("model=hub")


def test_digest_differs_only_where_config_does():
    assert config.digest(Lora(r=8), Data()) == config.digest(Lora(r=8), Data())
    assert config.digest(Lora(r=8)) != config.digest(Lora(r=9))


def test_flat_spells_keys_as_overrides_do():
    told = config.flat(Run())
    assert told["lora.r"] == 16
    assert told["quant.kind"] == "none"
    assert set(told) <= set(config.keys())


def test_keys_holds_groups_and_fields():
    assert {"lora", "lora.r", "trainer.neftune", "seed"} <= set(config.keys())


def test_retired_names_point_to_keys_that_exist():
    assert set(config.RETIRED.values()) <= set(config.keys())


@pytest.mark.parametrize("made", [lambda: Quant(double=True), lambda: Lora(r=0), lambda: Trainer(lr=NAN), lambda: Trainer(lr=INF),
                                  lambda: Model(path="x")])  # fmt: skip
def test_dataclass_checks_itself_without_hydra(made):
    with pytest.raises(ConfigError):
        made()


@pytest.mark.parametrize(
    ("given", "key", "why"),
    [
        (["lora=none"], "lora.r", "lora.variant=none has no adapter (lora=default has one)"),
        (["lora=none"], "lora.train", None),
        ([], "lora.r", None),
        (["eval=loss"], "eval.max_new_tokens", "eval.generate=false writes nothing (eval.generate=true does)"),
        ([], "eval.max_new_tokens", None),
        (["trainer=classify"], "eval.max_new_tokens", "a model of trainer.kind=classify writes nothing"),
        (["trainer=classify", "eval=loss"], "eval.generate", "a model of trainer.kind=classify writes nothing"),
        (["trainer=reward"], "eval.generate", "a model of trainer.kind=reward writes nothing"),
        (["trainer=dpo"], "eval.generate", None),
        (["trainer=classify", "eval.labels=';'"], "eval.generate", None),
        (["trainer=classify"], "data.template", "trainer.kind=classify reads texts as they are"),
        (["trainer=reward"], "data.template", None),
        (["trainer.steps=9"], "trainer.epochs", "trainer.steps=9 goes before (trainer.steps=null trains for epochs)"),
        (["trainer.steps=null"], "trainer.epochs", None),
        (
            ["data=jsonl", "data.path=a", "data.valid_path=b"],
            "data.valid",
            "data.valid_path holds the held-out rows (data.valid_path='' draws them)",
        ),
        (["trainer.optimizer=sgd"], "trainer.extra.adam_beta1", "trainer.optimizer=sgd has no such setting"),
        (["trainer.optimizer=lion_8bit"], "trainer.extra.adam_beta1", None),
        (
            ["trainer.optimizer=lion_8bit"],
            "trainer.extra.adam_epsilon",
            "trainer.optimizer=lion_8bit has no such setting",
        ),
        ([], "data.valid", None),
        ([], "data.columns.labels", None),
        (["data.group_by=author"], "data.columns.author", None),
        (['data.prompt="{title}"'], "data.columns.title", None),
        (["data.shape=text", 'data.completion="{plot}"'], "data.columns.plot", None),
        ([], "data.columns.txet", "no column of this name is read; did you mean data.columns.text?"),
        (
            ['data.prompt="{title}"'],
            "data.columns.text",
            "no column of this name is read: completion, title",
        ),
        (
            ["data.shape=alpaca"],
            "data.columns.labels",
            "no column of this name is read: input, instruction, output, system",
        ),
        (
            ["data.shape=text", 'data.completion="{plot}"'],
            "data.columns.text",
            "no column of this name is read: plot",
        ),
    ],
)
def test_key_without_effect_is_told(composed, given, key, why):
    assert config.idle(composed(*given), key) == why


@pytest.mark.parametrize(
    "given",
    [[], ["lora=none", "eval=loss"], ["trainer.steps=null"], ["data=jsonl", "data.path=a", "data.valid_path=b"]],
)
def test_effective_keys_are_those_that_are_not_idle(composed, given):
    run = composed(*given)
    flat = config.flat(run)
    assert config.effective(flat) == {key: value for key, value in flat.items() if config.idle(run, key) is None}
    assert ("lora.r" in config.effective(flat)) == ("lora=none" not in given)


def test_settings_that_an_optimizer_lacks_are_those_that_transformers_does_not_hand_to_it():
    from transformers import Trainer
    from transformers.training_args import OptimizerNames
    from trl import SFTConfig  # type: ignore

    settings, known = SFTConfig("x", use_cpu=True, bf16=False), 0
    for name in OptimizerNames:
        for key in config.MOMENTS:
            handed = []
            for value in (0.25, 0.5):
                settings.optim = name
                before = getattr(settings, key.rpartition(".")[2])
                setattr(settings, key.rpartition(".")[2], value)
                with suppress(ImportError, RuntimeError, ValueError):  # of a package or a device that is not here
                    handed.append(Trainer.get_optimizer_cls_and_kwargs(settings)[1])
                setattr(settings, key.rpartition(".")[2], before)
            if len(handed) == 2:
                known += 1
                idle = config._idle({"trainer.optimizer": name.value}, key) is not None
                assert idle == (handed[0] == handed[1]), (name, key)
    assert known > 40

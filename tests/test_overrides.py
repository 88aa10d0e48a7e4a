import pytest

from ftexp import config, overrides
from ftexp.config import Data, Run
from ftexp.errors import ConfigError
from ftexp.sweep import space


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lora.rank=8", "unknown key lora.rank .*ftexp calls it lora.r"),
        ("+lora.dropuot=0.1", "unknown key lora.dropuot .*did you mean lora.dropout"),
        ("lora_alpha=16", "ftexp calls it lora.alpha"),
        ("trainer.learning_rate=1", "ftexp calls it trainer.lr"),
        ("trainer.learnin_rate=1", "did you mean trainer.lr\\?"),
        ("max_seq_length=64", "ftexp calls it data.max_length"),
        ("trainer.dropout=0.1", r"did you mean lora\.dropout\?$"),
        ("lr=1e-3", r"did you mean trainer\.lr\?$"),
        ("batch=4", r"did you mean eval\.batch or trainer\.batch\?$"),
        ("batch_size=4", r"ftexp calls it trainer\.batch$"),
        ("model.name=a", r"ftexp calls it model\.path$"),
        ("gradient_accumulation_steps=4", r"ftexp calls it trainer\.accumulation$"),
        ("trainr.lr=1e-3", r"did you mean trainer\.lr\?$"),
        ("data.vaild=4", r"did you mean data\.valid\?$"),
        ("epoch=3", r"did you mean trainer\.epochs\?$"),
        ("modle=tiny", r"did you mean model\?$"),
        ("sweep.wrokers=2", r"did you mean sweep\.workers\?$"),
        ("sweep.nope=1", r"^unknown key sweep\.nope in sweep\.nope=1$"),
        ("lora.kind=dora", r"^unknown key lora\.kind in lora\.kind=dora$"),
        ("temperature=1", r"^unknown key temperature in temperature=1$"),
        ("+model._target_=os.system", r"^unknown key model\._target_ in \+model\._target_=os\.system$"),
        ("++trainer.callbacks=[a]", "unknown key trainer.callbacks"),
        ("trainer.bnb_4bit_compute_dtype=x", r"ftexp calls it model\.dtype$"),
        ("bnb_4bit_quant_type=nf4", r"ftexp calls it quant\.kind$"),
        ("data.train_size=0.9", r"ftexp calls it data\.valid$"),
        ("trainer.resume_from_checkpoint=true", "; the same command again goes on"),
        ("load_best_model_at_end=true", "; the weights of the last step are kept"),
        ("trainer.push_to_hub=true", r"; ftexp export RUN --push OWNER/NAME"),
        ("trainer.auto_find_batch_size=true", "; a batch is halved by itself"),
        ("trainer.save_steps=50", r"ftexp calls it trainer\.checkpoint_minutes, which counts minutes$"),
        ("trainer.gradient_checkpointing_kwargs=1", r"as trainer\.extra\.gradient_checkpointing_kwargs$"),
        ("lora.bias=all", "; ftexp trains no biases"),
        ("eval.do_sample=true", "; completions are scored greedily; ftexp generate --temperature"),
        ("eval.temperature=1", "; completions are scored greedily; ftexp generate --temperature"),
        ("lora=lora", r"got 'lora'; did you mean lora=default\?$"),
        ("hydra.sweeper.n_jobs=2", r"ftexp brings its own sweeper and calls it sweep\.workers$"),
        ("hydra.sweeper.direction=minimize", "calls it objectives, whose directions are known$"),
        ("hydra.sweeper.study_name=x", "calls it name$"),
        ("hydra.sweeper.sampler.seed=3", r"calls it sweep\.seed$"),
        ("+hydra.sweeper.params.lora.r=2,4", r": write lora\.r=2,4 -m, or a file in sweeps/$"),
        ("hydra.nope=1", r"of Hydra's own settings only hydra\.run\.dir"),
        ("model=nope", "smollm2_360m, tiny, got 'nope'"),
        ("model=embeded", "did you mean model=embedded"),
        ("lora=default,dorra", "got 'dorra'; did you mean lora=dora"),
        ("~lora.dropout", "keys cannot be deleted"),
        ("+lora.r=8", "lora.r exists already, write lora.r=8"),
        ("+lora=dora", r"^\+lora=dora: lora exists already, write lora=dora$"),
        ("++experiment=yoda_phi3", "experiment exists already, write experiment=yoda_phi3$"),
        ("+sweep=rank", "sweep exists already, write sweep=rank$"),
        ("lora=[dora,rslora]", r"^lora takes one option, got \[dora,rslora\]: write lora=dora,rslora -m for a run of"),
        ("lora=[dora,nope]", "lora must be one of .*, got 'nope'"),
        ("sweep=[rank,seeds]", r"^sweep takes one option, got \[rank,seeds\]: start each by its own command$"),
        ("lora.r", "not a Hydra override"),
    ],
)
def test_unknown_override_is_refused_with_nearest(given, message):
    with pytest.raises(ConfigError, match=message):
        overrides.check([given])


@pytest.mark.parametrize(
    "given", ["lora.r=8,16,64", "lora=dora,default", "model.path=a/b", "trainer.extra.adam_beta2=0.98", "hydra.verbose=true",
              "experiment=yoda_smollm2", "data.prompt='{a} {b}'", "trainer.lr=choice(1e-3,2e-3)", "lora={r: 4}"]
)  # fmt: skip
def test_known_override_passes(given):
    overrides.check([given])


def test_what_other_tools_call_a_key_is_a_key_here():
    assert set(overrides.CALLED.values()) <= set(config.keys())
    assert not set(overrides.CALLED) & (set(config.keys()) | set(config.RETIRED))


def test_rows_and_a_scale_that_brings_its_own_are_at_odds():
    with pytest.raises(ConfigError, match="data=chat cannot be chosen with scale=smoke, which brings rows of its own"):
        overrides.check(["experiment=yoda_phi3", "scale=smoke", "data=chat"])
    overrides.check(["experiment=yoda_phi3", "scale=none", "data=chat"])
    overrides.check(["experiment=yoda_phi3", "scale=smoke", "data.rows=50"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lora=none", "lora.r=8,16"], r"^lora\.r must be left out with lora=none: there is no adapter, got 8,16$"),
        (["lora.alpha=4", "lora.variant=none"], r"^lora\.alpha must be left out with lora=none"),
        (["lora=none", "+lora.extra.lora_bias=true"], r"^lora\.extra\.lora_bias must be left out"),
        (["track=none", "track.uri=x"], r"^track\.uri must be left out with track=none: runs are not tracked, got x$"),
        (["trainer.epochs=3", "trainer.steps=4"], r"^trainer\.epochs must be left out with trainer\.steps=4, which"),
    ],
)
def test_key_that_another_leaves_without_effect_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        overrides.check(given)


@pytest.mark.parametrize(
    "given",
    [["lora=none", "lora.train=[layers.1]"], ["lora=none,default", "lora.r=8"], ["lora.variant=lora", "lora.r=8"],
     ["lora=none", "lora.variant=lora", "lora.r=8"], ["track=none", "track.kind=mlflow", "track.uri=x"],
     ["trainer.epochs=3", "trainer.steps=null"], ["trainer.epochs=3", "trainer.steps=4,null"], ["trainer.epochs=3"]],
    ids=" ".join,
)  # fmt: skip
def test_keys_that_have_an_effect_pass(given):
    overrides.check(given)


def test_flags_move_to_the_front_and_a_name_is_added():
    assert overrides.prepare(["lora.r=8,16", "-m", "seed=1"]) == [
        "-m",
        "lora.r=8,16",
        "seed=1",
        "name=lora.r-8-16-seed-1",
    ]


@pytest.mark.parametrize(
    ("given", "handed"),
    [
        ("data.prompt=About {topic}:", 'data.prompt="About {topic}:"'),
        ('data.completion={a} "b"', r'data.completion="{a} \"b\""'),
        ("data.prompt='{a}','{b}'", "data.prompt='{a}','{b}'"),
        ("sweep.workers=2", "hydra.sweeper.workers=2"),
        ("sweep.at_most={cost/seconds: 9}", "++hydra.sweeper.at_most={cost/seconds: 9}"),
    ],
)
def test_short_forms_are_spelled_out(given, handed):
    assert overrides._spelled_out(given) == handed


def test_a_search_is_a_sweep_without_saying_so():
    assert overrides.prepare(["sweep=rank"])[0] == "-m"
    assert overrides.prepare(["lora.r=interval(1,9)", "sweep.sampler=tpe", "sweep.n_trials=3"])[0] == "-m"
    assert "-m" not in overrides.prepare(["sweep=rank", "--cfg", "job"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lora.r=2,4", "--cfg", "job", "-m"], "^--multirun and --cfg must not be given together"),
        (["-m", "--info", "config"], "^--multirun and --info must not be given together"),
        (["--cfg", "job", "--info"], "^--cfg and --info must not be given together"),
        (["--cfg", "jobb"], "^--cfg must be one of job, hydra, all, got 'jobb'$"),
        (["--info=foo"], "^--info must be one of all, config, .*, searchpath, got 'foo'$"),
        (["--cfg"], "^--cfg/-c: expected one argument$"),
        (["lora.r=8", "--foo", "3"], "^unknown option --foo; --help tells those there are$"),
        (["--resolve"], "^--resolve needs --cfg"),
        (["lora.r=2,4"], "^lora.r=2,4 has several values: add -m for a sweep over them$"),
        (
            ["lora.targets=q_proj,v_proj"],
            r"add -m for a sweep over them, or write lora\.targets=\[q_proj,v_proj\] for a list",
        ),
        (["lora.targets=[q_proj],[v_proj]"], r"has several values: add -m for a sweep over them$"),
        (["lora.r=2,4", "--cfg", "job"], "^lora.r=2,4 has several values: --cfg job shows the config of one run"),
    ],
)
def test_wrong_flags_are_refused_before_hydra_sees_them(argv, message):
    with pytest.raises(ConfigError, match=message):
        overrides.prepare(argv)


def test_flags_that_go_together_are_taken():
    assert overrides.prepare(["--help", "-m"]) == ["--help", "-m"]
    assert overrides.prepare(["--cfg", "job", "--resolve", "name=x"]) == ["--cfg", "job", "--resolve", "name=x"]


def test_given_name_is_kept():
    assert overrides.prepare(["name=mine"]) == ["name=mine"]


def test_library_keys_get_their_plus_signs():
    assert "++trainer.extra.adam_beta2=0.9" in overrides.prepare(["trainer.extra.adam_beta2=0.9"])


def test_different_commands_never_share_a_name():
    given = [["lora.r=1"], ["lora.r=-1"], ["lora.r=1,2"], ["lora.r=12"], ["data.prompt='{a}'"], ["data.prompt='{a} '"],
             ["a=" + "x" * 80 + "1"], ["a=" + "x" * 80 + "2"]]  # fmt: skip
    names = [overrides.slug(g) for g in given]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 64 for name in names)


def test_a_default_name_holds_nothing_that_may_change_between_launches():
    from dataclasses import fields

    from ftexp.sweep import study
    from ftexp.sweep.options import Options

    free = ("sweep.plan_at_most.memory_gib=8", "sweep.over=skip", "sweep.at_most={cost/seconds: 9}", "sweep.pruner=asha",
            "sweep.pruner_args.reduction_factor=3", "sweep.timeout_minutes=5", "sweep.tokens_per_second=9",
            "sweep.usd_per_hour=2", "sweep.n_trials=3", "trainer.checkpoint_minutes=1")  # fmt: skip
    assert {overrides.slug(["lora.r=8,16", text]) for text in free} == {"lora.r-8-16"}
    kept = {f"sweep.{key}" for key in overrides.KEPT_KEYS}
    told = study.Identity.of(space.parse([]), Options(), ["valid/loss"], {}, {}).told
    assert {key for key in told if key.startswith("sweep.")} == kept - {"sweep.params", "sweep.storage"}
    assert set(overrides.SWEEP_KEYS) == {f.name for f in fields(Options)} - {"_target_", "_recursive_"}


def test_a_sweep_under_the_longer_name_of_before_is_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["lora.r=8,16", "sweep.pruner=asha", "-m"]
    assert overrides.prepare(given)[-1] == "name=lora.r-8-16"
    (tmp_path / "outputs/sweeps/lora.r-8-16-sweep.pruner-asha").mkdir(parents=True)
    assert overrides.prepare(given)[-1] == "name=lora.r-8-16-sweep.pruner-asha"
    (tmp_path / "outputs/sweeps/lora.r-8-16").mkdir()
    assert overrides.prepare(given)[-1] == "name=lora.r-8-16"


@pytest.mark.parametrize(
    ("argv", "wanted"), [(["-m"], "sweep"), ([], "single"), (["--cfg", "job"], None), (["--help"], None)]
)
def test_runs_tells_what_is_asked(argv, wanted):
    assert overrides.runs(argv) == wanted


@pytest.mark.parametrize("group", ["experiment", "sweep"])
def test_a_group_that_is_unset_anyway_may_be_unset(group, cli):
    code, out, err = cli(f"{group}=null", "model=tiny", "--cfg", "job")
    assert code == 0, err
    assert "kind: tiny" in out


def test_mapped_column_is_refused_where_no_trial_reads_it():
    runs = [Run(data=Data(prompt=prompt, columns={"title": "t"})) for prompt in ("{prompt}", "{title}: {prompt}")]
    overrides.check_effect(["++data.columns.title=t", "++data.columns={title: t}"], runs)
    overrides.check_effect(["++data.columns.title=t"], runs[::-1])
    for given in (["++data.columns.title=t"], ["++data.columns={prompt: p, title: t}"]):
        with pytest.raises(ConfigError, match=r"^data\.columns\.title would change nothing, got t: no column of this"):
            overrides.check_effect(given, runs[:1])


@pytest.mark.parametrize("group", ["experiment", "scale", "model", "sweep"])
def test_unknown_option_is_told_with_the_known_ones_however_it_is_given(group):
    for given in (f"{group}=nope", f"+{group}=nope"):
        with pytest.raises(ConfigError, match=rf"^{group} must be one of .*, .*, got 'nope'"):
            overrides.check([given])

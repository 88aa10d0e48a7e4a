"""Artefacts that would run code, leave their root or never end: none is executed. Made at test time, none is kept.

Each is given to the code that would meet it. What runs writes a file named `executed`; there must be none.
"""

import json
import os
import pickle
import shutil

import pytest
from conftest import TINY, UNWRITTEN

from ftexp import data, experiment, model, overrides
from ftexp.config import Data, Dtype, Kind, Model, Quant, Source
from ftexp.data import chat
from ftexp.errors import ConfigError, DataError, FtexpError, MachineError, Preempted
from ftexp.files import read_json, sha256
from ftexp.sweep import study
from ftexp.train import checkpoints
from ftexp.train.control import Control


class Evil:
    """Unpickled, it opens a file for writing."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.fixture
def marker(tmp_path):
    """Where code that runs leaves its mark; checked after each test."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "it was executed"


def test_sabotage_unpickled_it_leaves_its_mark(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()


# the command line


OVERRIDES = [
    ["+hydra.callbacks.x._target_=builtins.open", "+hydra.callbacks.x.file=MARKER", "+hydra.callbacks.x.mode=w"],
    ["hydra.sweeper._target_=pathlib.Path.touch", "lora.r=2,4", "-m"],
    ["+hydra.launcher._target_=pathlib.Path.touch", "lora.r=2,4", "-m"],
    ["+hydra.job_logging.handlers.x.()=pathlib.Path.touch"],
    ["hydra/job_logging=stdout"],
    ["+hydra.job.env_set.PYTHONSTARTUP=MARKER"],
    ["+model._target_=builtins.open"],
    ["+data._target_=builtins.open"],
    ["--config-dir", "evil", "experiment=x"],
    ["--config-path", "evil"],
    ["--config-name", "evil"],
    ["--experimental-rerun", "evil.pickle"],
    ["name=../../executed"],
    ["name=/tmp/executed"],
    ["name=..", "lora.r=2,4", "-m"],
    ["track.experiment=${oc.env:HF_TOKEN}"],
    ["track.experiment=${oc.env:MLFLOW_TRACKING_PASSWORD}"],
    ["track.experiment=${oc.env:INNOCENT}"],
    ["data.prompt={prompt.__class__.__mro__}"],
]


@pytest.mark.parametrize("argv", OVERRIDES, ids=" ".join)
def test_command_line_runs_no_code_and_leaves_no_root(cli, tmp_path, marker, monkeypatch, argv):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "swordfish")
    monkeypatch.setenv("INNOCENT", "ghp_" + "b" * 36)
    (tmp_path / "evil.pickle").write_bytes(pickle.dumps(Evil(marker)))
    code, out, err = cli(*TINY, *[text.replace("MARKER", str(marker)) for text in argv])
    assert code == 2, err
    assert err.startswith("ftexp: ")
    assert not [secret for secret in ("swordfish", "hf_aaa", "ghp_bbb") if secret in err]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pickle"]


# files of values, as a stranger's `conf/` may hold them


YAML = {
    "callback": "# @package _global_\nhydra:\n  callbacks:\n    x: {_target_: builtins.open, file: MARKER, mode: w}\n",
    "tag": "# @package _global_\nname: !!python/object/apply:builtins.open [MARKER, w]\n",
    "logging": "# @package _global_\nhydra:\n  job_logging:\n    handlers: {x: {(): builtins.open, file: MARKER}}\n",
    "environment": "# @package _global_\nhydra:\n  job:\n    env_set: {TOKEN: '${oc.env:HF_TOKEN}'}\n",
    "target": "# @package _global_\nlora:\n  extra: {_target_: builtins.open, file: MARKER}\n",
}


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("kind", YAML)
def test_file_of_values_runs_no_code(cli, tmp_path, marker, monkeypatch, kind, many):
    conf = tmp_path / "conf"
    shutil.copytree(overrides.CONF, conf)
    (conf / "experiment" / "evil.yaml").write_text(YAML[kind].replace("MARKER", str(marker)))
    monkeypatch.setattr(overrides, "CONF", conf)
    code, _, err = cli(*TINY, "experiment=evil", "track=none", *(["lora.r=2,4", "-m"] if many else []))
    assert code == 2, err
    assert "Traceback" not in err
    assert not (tmp_path / "outputs").exists()


# rows


def parquet_with_a_pickled_type(marker):
    import io

    import pyarrow
    import pyarrow.parquet

    told = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Evil(marker)),
    }
    fields = [pyarrow.field("prompt", pyarrow.string(), metadata=told), pyarrow.field("completion", pyarrow.string())]
    table = pyarrow.table([["a", "b"], ["c", "d"]], schema=pyarrow.schema(fields))
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "parquet"])
def test_pickle_for_rows_is_refused(tmp_path, marker, ending):
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(DataError, match=f"rows.{ending}"):
        data.load(Data(kind=Source.file, path=str(path), valid=1))


def test_type_pickled_into_parquet_is_read_as_its_text_or_refused(tmp_path, marker):
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet_with_a_pickled_type(marker))
    try:
        rows = data.load(Data(kind=Source.file, path=str(path), valid=1))
    except DataError:
        return
    assert {row.prompt for row in (*rows.train, *rows.valid)} == {"a", "b"}


def test_formulas_of_a_spreadsheet_stay_text(tmp_path, marker):
    evil = f"=cmd|'/C touch {marker}'!A1"
    path = tmp_path / "rows.csv"
    path.write_text(f'prompt,completion\n"{evil}",b\n@SUM(1),c\n')
    rows = data.load(Data(kind=Source.file, path=str(path), valid=1))
    assert {row.prompt for row in (*rows.train, *rows.valid)} == {evil, "@SUM(1)"}


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_file_that_never_ends_is_refused_at_once(tmp_path, what):
    path = tmp_path / "rows.jsonl"
    os.mkfifo(path) if what == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match="data.path must be a file"):
        data.load(Data(kind=Source.file, path=str(path), valid=1))


# checkpoints


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A run left at step 2, with its checkpoint."""

    class After:
        left = 2

        def is_set(self):
            self.left -= 1
            return self.left <= 0

    from ftexp import config
    from ftexp.sweep import plugin

    config.register()
    plugin.register()
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(overrides.CONF), **overrides.BASE):
        run = config.build(compose("config", [*UNWRITTEN, "track=none", "eval=loss", "trainer.checkpoint_minutes=0"]))
    folder = tmp_path_factory.mktemp("left") / "a"
    with pytest.raises(Preempted):
        experiment.execute(run, folder, "x", control=Control(leave=After()))
    return run, folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin",
                                  "adapter_model.bin", "pytorch_model.bin"])  # fmt: skip
def test_pickle_in_a_checkpoint_is_not_unpickled_though_it_is_sealed(left, tmp_path, marker, name):
    """Sealed by the attacker himself, so that the hashes are right."""
    run, folder = left
    mine = tmp_path / "a"
    shutil.copytree(folder, mine)
    checkpoint = mine / "checkpoints" / "checkpoint-2"
    kept = read_json(checkpoint / checkpoints.SEAL)
    (checkpoint / name).write_bytes(pickle.dumps(Evil(marker)))
    if name == "adapter_model.bin":
        (checkpoint / "adapter_model.safetensors").unlink()
    kept["files"] = {p.name: sha256(p) for p in checkpoint.iterdir() if p.name != checkpoints.SEAL}
    (checkpoint / checkpoints.SEAL).write_text(json.dumps(kept))
    assert checkpoints.store(checkpoint.parent, kept["fingerprint"]).resume is not None, "it looks good"
    try:
        experiment.execute(run, mine, "x")
    except Exception as error:
        assert not isinstance(error, AssertionError), error


# the record of a sweep


def test_pickles_beside_and_within_a_journal_are_not_unpickled(tmp_path, marker):
    (tmp_path / f"{study.JOURNAL}.snapshot").write_bytes(pickle.dumps(Evil(marker)))
    study.storage(tmp_path, None)
    with (tmp_path / study.JOURNAL).open("ab") as out:
        out.write(pickle.dumps(Evil(marker), protocol=0) + b"\n")
    with pytest.raises(MachineError, match="must be one entry of the sweep's record"):
        study.storage(tmp_path, None)


# chat templates and model folders


@pytest.fixture
def own(tmp_path):
    """A folder with a model and a tokenizer."""
    base = model.fresh(Model(kind=Kind.tiny, dtype=Dtype.float32), Quant())
    base.model.save_pretrained(tmp_path / "m")
    base.tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def run_on(composed, own):
    return composed(*UNWRITTEN[1:], "model=hub", f"model.path={own}", "track=none", "eval=loss", "data.template=model")


TEMPLATES = {
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "import": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch MARKER') }}",
    "attr": "{{ (''|attr('format')|attr('__globals__'))['os'].system('touch MARKER') }}",
    "endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_hostile_template_runs_nothing_and_ends(composed, own, marker, kind):
    path = own / "chat_template.jinja"
    path.write_text(TEMPLATES[kind].replace("MARKER", str(marker)))
    with pytest.raises((ConfigError, DataError), match=r"chat template"):
        experiment.prepare(run_on(composed, own))


def test_sabotage_limits_are_what_ends_a_template(monkeypatch):
    """Without the check nothing else in the way of a template looks at its time."""
    bomb = "{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}"
    chat.check.cache_clear()
    monkeypatch.setattr(chat, "KNOWN", frozenset({chat.digest(bomb)}))
    chat.check(bomb)


def test_own_templates_are_known_and_a_plain_one_passes(monkeypatch):
    from ftexp.model import tiny

    assert chat.digest(tiny.TEMPLATE) in chat.KNOWN
    chat.check("{% for m in messages %}{{ m['content'] }}{% endfor %}")


@pytest.mark.parametrize(
    "kind", ["remote code", "tokenizer code", "pickled weights", "pickled and whole", "kernel", "way out"]
)
def test_hostile_model_folder_runs_nothing(composed, own, marker, monkeypatch, kind):
    told = json.loads((own / "config.json").read_text())
    (own / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    weights = own / "model.safetensors"
    match kind:
        case "remote code":
            told |= {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}
        case "tokenizer code":
            path = own / "tokenizer_config.json"
            kept = json.loads(path.read_text()) | {
                "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
                "tokenizer_class": "Evil",
            }
            path.write_text(json.dumps(kept))
        case "pickled weights" | "pickled and whole":
            if kind == "pickled weights":
                weights.unlink()
            (own / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
        case "kernel":
            told |= {"_attn_implementation_internal": "stranger/kernel"}
        case "way out":
            weights.rename(own.parent / "elsewhere.safetensors")
            index = {"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
            (own / "model.safetensors.index.json").write_text(json.dumps(index))
    (own / "config.json").write_text(json.dumps(told))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to trust"))
    run = run_on(composed, own)
    try:
        experiment.check(run, None)
        model.tokenizer(run.model)
        model._warm = None
        loaded = model.load(run.model, run.quant)
    except FtexpError as error:
        assert kind != "pickled and whole", error
        return
    assert kind in ("tokenizer code", "pickled and whole"), f"{kind} was loaded: {loaded.weights}"

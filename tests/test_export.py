"""A run as a folder for others: whole or absent, equal to the run or refused, and pushed without a word of the token."""

import contextlib
import io
import json
import logging
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import encoders
import pytest
import torch
from safetensors.torch import load_file

from ftexp import data, evaluate, experiment, export, fidelity, model, trained
from ftexp.data import prompts
from ftexp.errors import Unfaithful
from ftexp.files import read_json, write_json
from ftexp.model import saved, tiny


@pytest.fixture
def run(at, monkeypatch, capsys):
    """Return a function that runs `ftexp export`; gives exit code, stdout and stderr."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["ftexp export", *map(str, argv)])
        capsys.readouterr()
        code = export.main()
        return code, *capsys.readouterr()

    return call


def snippet(folder, monkeypatch, at):
    """Run the Python of a card, as a reader would; return what it prints."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace('folder = "."', f"folder = {str(folder)!r}").replace("max_new_tokens=64", "max_new_tokens=4")
    monkeypatch.chdir(at)
    space = {}
    with contextlib.redirect_stdout(told := io.StringIO()):
        exec(code, space)
    return told.getvalue(), space["model"]


def test_adapter_is_the_runs_own_and_loads_with_peft(run, tmp_path, monkeypatch, at):
    kept = trained.find("s")
    code, out, err = run("s", "--to", tmp_path / "a", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["files"].keys() >= {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        kept.folder / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert read_json(tmp_path / "a" / "adapter_config.json")["base_model_name_or_path"] == "ftexp-tiny"
    text = "".join(p.read_text() for p in (tmp_path / "a").iterdir() if p.suffix in (".json", ".md"))
    assert str(Path.home()) not in text and str(at) not in text
    assert "\ntokenizer = " in (tmp_path / "a" / "README.md").read_text()
    snippet(tmp_path / "a", monkeypatch, at)
    base = tiny.model("eager")
    ids = torch.tensor([[5, 6, 7]])
    bare = base(ids).logits
    tuned = saved.attached(base, tmp_path / "a")
    assert not torch.equal(tuned(ids).logits, bare)


def test_merged_model_answers_as_the_run(run, tmp_path, monkeypatch, at):
    """Loaded by transformers alone, it has the loss that the run's own file tells."""
    code, out, err = run("s", "--to", tmp_path / "m", "--form", "merged", "--json")
    assert code == 0, err
    told = json.loads(out)["fidelity"]
    kept = trained.find("s")
    loss = kept.trial["scores"]["valid/loss"]
    assert told["before"] == pytest.approx(loss, rel=1e-9)
    assert told["after"] == pytest.approx(loss, rel=1e-6)
    assert told["rows"] == 12 and told["choices"] == 1 and told["completions"] == told["compared"] == 12
    printed, loaded = snippet(tmp_path / "m", monkeypatch, at)
    assert printed
    again = kept.config()
    rows = prompts.render(data.load(again.data).valid, tiny.tokenizer(), again.data)
    assert evaluate.score(loaded.eval(), tiny.tokenizer(), rows, again.eval, "t").scores["loss"] == pytest.approx(
        loss, rel=1e-6
    )
    assert "Faithful to the run" in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_within_its_limit(run, tmp_path, dtype):
    code, out, err = run("s", "--to", tmp_path / "m", "--form", "merged", "--dtype", dtype, "--json")
    assert code == 0, err
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert {str(weight.dtype) for weight in stored.values()} == {f"torch.{dtype}"}
    assert json.loads(out)["fidelity"]["limit"]["loss"] == fidelity.LIMITS[dtype].loss


def test_classifier_is_merged_with_its_head_and_labels(run, tmp_path, monkeypatch, at):
    code, out, err = run("c", "--to", tmp_path / "m", "--form", "merged", "--json")
    assert code == 0, err
    kept = trained.find("c")
    assert json.loads(out)["fidelity"]["after"] == pytest.approx(kept.trial["scores"]["valid/loss"], rel=1e-6)
    told = read_json(tmp_path / "m" / "config.json")
    assert list(told["id2label"].values()) == kept.trial["labels"]
    printed, _ = snippet(tmp_path / "m", monkeypatch, at)
    assert printed.startswith("tensor(")
    code, _, err = run("c", "--to", tmp_path / "a")
    assert code == 0, err
    monkeypatch.undo()
    monkeypatch.chdir(at)
    other = snippet(tmp_path / "a", monkeypatch, at)[0]
    numbers = [list(map(float, re.findall(r"0\.\d+", text))) for text in (printed, other)]
    assert len(numbers[0]) == 20 and numbers[0] == pytest.approx(
        numbers[1], abs=2e-4
    )  # base with the adapter says the same as merged


def test_model_that_moved_is_refused_and_removed(run, tmp_path, monkeypatch):
    """Sabotage of the merge: one matrix of fourteen gets its update twice."""
    honest = saved.merged

    def twice(*given):
        made = honest(*given)
        fresh = tiny.model("eager").state_dict()
        name = "model.layers.1.mlp.down_proj.weight"
        weight = made.get_parameter(name)
        weight.data += 3 * (weight.data - fresh[name])
        return made

    monkeypatch.setattr(saved, "merged", twice)
    code, out, err = run("s", "--to", tmp_path / "m", "--form", "merged")
    assert (code, out) == (Unfaithful.exit_code, "") == (5, "")
    assert "the model as written is not the run s/1: held-out loss 5." in err and "it was removed" in err
    assert os.listdir(tmp_path) == []


def test_sabotage_without_the_gate_the_moved_model_would_stay(run, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "LIMITS", dict.fromkeys(fidelity.LIMITS, fidelity.Limit(1e9, 0.0)))
    monkeypatch.setattr(saved, "merged", lambda *_: tiny.model("eager"))  # the base, no adapter at all
    assert run("s", "--to", tmp_path / "m", "--form", "merged")[0] == 0
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_packing_is_warned_of_measured_and_kept(run, tmp_path):
    code, out, err = run("s", "--to", tmp_path / "m", "--form", "merged4bit", "--json")
    assert code == 0, err
    assert "warning: packing a merged model to 4 bit changes its answers" in err
    told = json.loads(out)["fidelity"]
    assert told["after"] != told["before"]
    assert read_json(tmp_path / "m" / "config.json")["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    card = (tmp_path / "m" / "README.md").read_text()
    assert "nothing was done to win it back" in card and f"{told['after']:.6f}" in card


def test_sealed_rows_are_not_rendered(run, tmp_path, monkeypatch, tiny):
    """A recorder on the one render sees held-out rows and no sealed one; it would see them in a confirmation."""
    kept = trained.find("s")
    splits = data.load(kept.config().data)
    seen, honest = set(), prompts.examples

    def record(rows, *more):
        seen.update(row.prompt for row in rows)
        return honest(rows, *more)

    monkeypatch.setattr(prompts, "examples", record)
    assert run("s", "--to", tmp_path / "m", "--form", "merged")[0] == 0
    sealed = {row.prompt for row in splits.test}
    assert len(sealed) == 10 and seen >= {row.prompt for row in splits.valid} and not seen & sealed
    experiment.generation(kept.config(), splits, splits.test)
    assert seen >= sealed


def test_rows_that_changed_are_refused_where_they_are_needed(run, tmp_path, monkeypatch):
    honest = data.load
    monkeypatch.setattr(
        data, "load", lambda told: __import__("dataclasses").replace(honest(told), train=honest(told).train[1:])
    )
    code, _, err = run("s", "--to", tmp_path / "m", "--form", "merged")
    assert code == 3 and "the rows are no longer those of s/1" in err
    assert run("s", "--to", tmp_path / "a")[0] == 0
    assert os.listdir(tmp_path) == ["a"]


def test_interruption_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(saved, "read", interrupted)
    assert run("s", "--to", tmp_path / "m", "--form", "merged")[0] == 130
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        (["--dtype", "float16"], 2, "--dtype must be left out with --form adapter"),
        (["--public"], 2, "--public must be left out without --push"),
        (["--push", "name"], 2, "--push must be OWNER/NAME"),
        (["--push", "a/../b"], 2, "--push must be OWNER/NAME"),
        (["--push", "me/x"], 4, "--push needs a token of the hub"),
    ],
)
def test_what_is_wrong_is_told_first(argv, code, told, run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("a model was loaded"))
    got, _, err = run("s", "--to", tmp_path / "a", *argv)
    assert got == code and told in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    got, _, err = run("s", "--to", tmp_path / "full")
    assert got == 2 and "must be a new or an empty folder" in err


def test_push_makes_a_private_repository_and_uploads_the_folder(run, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private, exist_ok))
            return f"https://hub.example/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(os.listdir(folder_path))))

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    code, out, err = run("s", "--to", tmp_path / "a", "--push", "me/yoda")
    assert code == 0, err
    assert calls[0] == ("me/yoda", True, True)
    assert calls[1] == ("me/yoda", sorted(os.listdir(tmp_path / "a")))
    assert out.endswith("pushed to https://hub.example/me/yoda\n")
    assert "hf_secret" not in out + err
    assert run("s", "--to", tmp_path / "b", "--push", "me/yoda", "--public")[0] == 0
    assert calls[2] == ("me/yoda", False, True)


def test_refusal_of_the_hub_is_one_line_without_the_token(run, tmp_path, monkeypatch):
    """The real client against a server that refuses, and says the token back."""
    heard = []
    monkeypatch.setattr(logging.root, "handlers", [])  # Hydra's, of an earlier test, with the stream it had there

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(self.headers["Authorization"])
            told = json.dumps({"error": f"no: {self.headers['Authorization']}"}).encode()
            self.send_response(403)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import HfApi, constants

    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=address, token="hf_secret"))
    try:
        code, out, err = run("s", "--to", tmp_path / "a", "--push", "me/yoda")
    finally:
        server.shutdown()
    assert heard and "hf_secret" in heard[0]
    assert code == 4 and err.count("\n") <= 3
    assert "hf_secret" not in out + err
    assert "is whole, send it again with: hf upload me/yoda" in err
    assert (tmp_path / "a" / "README.md").exists()


@pytest.mark.hub
def test_push_to_the_real_hub(run, tmp_path):
    """Needs HF_TOKEN, and FTEXP_TEST_REPO=OWNER/NAME that may be written to."""
    name = os.environ["FTEXP_TEST_REPO"]
    assert run("s", "--to", tmp_path / "a", "--push", name)[0] == 0


def exported_with_an_embedding(tmp_path, monkeypatch, capsys):
    """Train an adapter on the embedding of a model whose output head is the same matrix; export it merged."""
    from conftest import TINY

    from ftexp import run as command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        ["ftexp.run", *TINY, "lora.targets=[embed_tokens,q_proj]", "trainer.lr=0.1", "track=none", "name=t"],
    )
    assert command.main() == 0
    monkeypatch.setattr(sys, "argv", ["ftexp export", "t", "--to", "m", "--form", "merged"])
    capsys.readouterr()
    return export.main(), capsys.readouterr().err


def test_update_of_a_tied_matrix_is_merged_into_one_end_of_it(tmp_path, monkeypatch, capsys):
    assert exported_with_an_embedding(tmp_path, monkeypatch, capsys)[0] == 0
    assert read_json(tmp_path / "m/config.json")["tie_word_embeddings"] is False


def test_update_of_both_ends_of_a_tied_matrix_is_refused(tmp_path, monkeypatch, capsys):
    """What a merge into the shared matrix would make is another model."""
    from ftexp.model import saved

    monkeypatch.setattr(saved, "_untied", lambda base: None)
    code, err = exported_with_an_embedding(tmp_path, monkeypatch, capsys)
    assert code == 5
    assert "the model as written is not the run t: held-out loss 5." in err
    assert not (tmp_path / "m").exists()


def test_template_of_training_goes_with_the_tokenizer(composed):
    told = {}
    for template in ("model", "chatml", "plain"):
        told[template] = export.shipped(
            tiny.tokenizer(), composed("model=tiny", f"data.template={template}")
        ).chat_template
    assert told["plain"] is None
    assert told["chatml"] == prompts.CHATML
    assert told["model"] == tiny.TEMPLATE
    classifier = composed("model=tiny", "data=genres", "trainer=classify")
    assert export.shipped(tiny.tokenizer(), classifier).chat_template == tiny.TEMPLATE


@pytest.fixture
def saved_base(tmp_path, monkeypatch, capsys):
    """Return a function that trains on a saved tiny model, the config of whose base it may change; gives the run."""
    from conftest import TINY

    from ftexp import run as command

    def train(*given, **settings):
        monkeypatch.chdir(tmp_path)
        base = tiny.model("eager")
        for name, value in settings.items():
            setattr(base.generation_config, name, value)
        base.save_pretrained("my-model")
        tiny.tokenizer().save_pretrained("my-model")
        argv = [t for t in TINY if t != "model=tiny"] + ["model=hub", "model.path=./my-model", "track=none"]
        monkeypatch.setattr(sys, "argv", ["ftexp.run", *argv, *given, "name=r"])
        assert command.main() == 0, capsys.readouterr().err
        return trained.find("r")

    return train


def sorter(cli, monkeypatch, kind, folder, *given):
    """Train a classifier on a small encoder of a kind; bitsandbytes reads blocks of 64 numbers on some CPUs."""
    from conftest import UNWRITTEN

    monkeypatch.chdir(folder)
    wide = {"dim": 64} if kind == "distilbert" else {"hidden_size": 64}
    monkeypatch.setitem(encoders.KINDS, kind, encoders.KINDS[kind] | wide)
    more = ["model=hub", f"model.path=./{encoders.save(kind, folder / kind).name}", "data=genres", "trainer=classify"]
    code, _, err = cli(*[t for t in UNWRITTEN if t != "model=tiny"], *more, *given, "track=none", "name=r")
    assert code == 0, err
    return trained.find("r")


@pytest.mark.parametrize("lora", ["default", "none"])
def test_model_stops_where_the_run_does_and_not_at_the_bases_end_alone(lora, saved_base, run, tmp_path, monkeypatch):
    kept = saved_base(f"lora={lora}", eos_token_id=0)
    with trained.load(kept) as loaded:
        ends = evaluate.ends(loaded.tuned, loaded.tokenizer)
    assert ends == [0, 2]
    code, _, err = run("r", "--to", tmp_path / "m", "--form", "merged")
    assert code == 0, err
    assert read_json(tmp_path / "m" / "generation_config.json")["eos_token_id"] == ends
    assert "eos_token_id" not in (tmp_path / "m" / "README.md").read_text()
    if lora == "default":
        assert run("r", "--to", tmp_path / "a")[0] == 0
        assert "do_sample=False, eos_token_id=[0, 2])" in (tmp_path / "a" / "README.md").read_text()
        snippet(tmp_path / "a", monkeypatch, tmp_path)


@pytest.mark.parametrize("packing", [["quant=nf4"], ["quant=nf4", "quant.double=false"], ["quant=nf4", "lora=loftq"]])
def test_adapter_of_a_packed_base_is_put_on_one_that_is_packed_alike(packing, saved_base, run, tmp_path, monkeypatch):
    """The reader's own lines give the held-out loss that the run recorded."""
    kept = saved_base(*packing)
    assert run("r", "--to", tmp_path / "a")[0] == 0
    printed, loaded = snippet(tmp_path / "a", monkeypatch, tmp_path)
    assert printed
    found, again = loaded.get_base_model().config.quantization_config, kept.config()
    assert found.bnb_4bit_use_double_quant == again.quant.double
    assert found.bnb_4bit_quant_type == "nf4" and found.bnb_4bit_compute_dtype == torch.float32
    rows = prompts.render(data.load(again.data).valid, tiny.tokenizer(), again.data)
    loss = evaluate.score(loaded.eval(), tiny.tokenizer(), rows, again.eval, "t").scores["loss"]
    assert loss == pytest.approx(kept.trial["scores"]["valid/loss"], abs=1e-4)  # some CPUs repack and round


def test_adapter_of_a_classifier_on_a_packed_base_leaves_its_head_unpacked(cli, run, tmp_path, monkeypatch):
    kept = sorter(cli, monkeypatch, "roberta", tmp_path, "quant=nf4")
    assert run("r", "--to", tmp_path / "a")[0] == 0
    printed, loaded = snippet(tmp_path / "a", monkeypatch, tmp_path)
    assert len(re.findall(r"0\.\d+", printed)) == len(kept.trial["labels"])
    head = loaded.get_base_model().classifier.modules_to_save["default"]
    assert type(head.dense) is type(head.out_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("distilbert", ["pre_classifier", "classifier"]),
        ("roberta", ["classifier.dense", "classifier.out_proj"]),
        ("bert", ["bert.pooler.dense", "classifier"]),
    ],
)
def test_head_of_a_classifier_is_not_packed_with_its_model(kind, head, cli, run, tmp_path, monkeypatch):
    kept = sorter(cli, monkeypatch, kind, tmp_path)
    code, out, err = run("r", "--to", tmp_path / "m", "--form", "merged4bit", "--json")
    assert code == 0, err
    told = json.loads(out)["fidelity"]
    assert told["before"] == pytest.approx(kept.trial["scores"]["valid/loss"], rel=1e-6)
    assert told["moved"] <= fidelity.PACKED.loss and told["choices"] >= fidelity.PACKED.choices
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert {stored[f"{name}.weight"].dtype for name in head} == {torch.float32}
    assert sum(weight.dtype == torch.uint8 and "quant" not in name for name, weight in stored.items()) >= 12


def test_one_end_stays_one_number(saved_base, run, tmp_path):
    saved_base(eos_token_id=[2])
    assert run("r", "--to", tmp_path / "m", "--form", "merged")[0] == run("r", "--to", tmp_path / "a")[0] == 0
    assert read_json(tmp_path / "m" / "generation_config.json")["eos_token_id"] == 2
    assert "eos_token_id" not in (tmp_path / "a" / "README.md").read_text()


def test_packed_base_is_merged_into_its_weights_before_packing(tmp_path, monkeypatch, capsys):
    """A run on nf4 weights: the merged model stands on the full weights, within the limit for packed bases."""
    from conftest import TINY

    from ftexp import run as command

    monkeypatch.chdir(tmp_path)
    tiny.model("eager").save_pretrained("my-model")
    tiny.tokenizer().save_pretrained("my-model")
    given = [t for t in TINY if t != "model=tiny"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["ftexp.run", *given, "model=hub", "model.path=./my-model", "quant=nf4", "track=none", "name=q"],
    )
    assert command.main() == 0
    monkeypatch.setattr(sys, "argv", ["ftexp export", "q", "--to", "m", "--form", "merged", "--json"])
    capsys.readouterr()
    assert export.main() == 0
    told = json.loads(capsys.readouterr().out)["fidelity"]
    assert told["limit"]["loss"] == fidelity.PACKED.loss and 0 < told["moved"] < fidelity.PACKED.loss
    assert {weight.dtype for weight in load_file("m/model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("name", ["whole", "sorter_whole", "judge", "judge_whole"])
def test_whole_models_and_reward_models_answer_as_their_runs(name, stages, run, tmp_path, monkeypatch):
    folder = stages.parent.parent
    monkeypatch.chdir(folder)
    kept = trained.find(name)
    code, out, err = run(name, "--to", tmp_path / "m", *(["--form", "merged"] if name == "judge" else []), "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["form"] == "merged"
    assert told["fidelity"]["after"] == pytest.approx(kept.trial["scores"]["valid/loss"], rel=1e-6)
    card = (tmp_path / "m" / "README.md").read_text()
    assert ("trained without an adapter" in card) == (name != "judge")
    assert ("| rank |" in card) == (name == "judge")
    printed, loaded = snippet(tmp_path / "m", monkeypatch, folder)
    assert printed
    head = getattr(loaded, "score", None)
    assert (head.out_features if head else 0) == {"whole": 0, "sorter_whole": 20}.get(name, 1)


@pytest.mark.parametrize("template", ["model", "plain"])
def test_reward_card_gives_the_reward_of_the_run(template, stages, run, tmp_path, monkeypatch):
    """The reader's own lines, adapter and merged, print what the run says an answer is worth."""
    from ftexp.data.shapes import Row
    from ftexp.train import rewarder

    folder = stages.parent.parent
    monkeypatch.chdir(folder)
    trial = read_json(stages / "judge" / "trial.json")
    write_json(stages / "judge" / "trial.json", trial | {"config": trial["config"] | {"data.template": template}})
    at_work = rewarder._load(trained.find("judge"))
    asked, text = ("a prompt and", "its answer") if template == "plain" else ("a prompt", "an answer")
    asked += " " if template == "plain" else ""
    wanted = at_work.rewards([Row(asked, text, "x")], [text], 1, "t")[0]
    for form in ("merged", "adapter"):
        code, _, err = run("judge", "--to", tmp_path / form, "--form", form)
        assert code == 0, err
        assert at_work.run.data.template.value == template
        monkeypatch.chdir(folder)
        printed, _ = snippet(tmp_path / form, monkeypatch, folder)
        assert float(re.search(r"-?\d+\.\d+", printed)[0]) == pytest.approx(wanted, abs=2e-4)


def test_moved_whole_model_is_refused_and_removed(stages, run, tmp_path, monkeypatch):
    monkeypatch.chdir(stages.parent.parent)
    plain = saved.read

    def moved(folder, *args, **more):
        base = plain(folder, *args, **more)
        if Path(folder).parent.name != "whole":  # what was written, not what the run holds
            with torch.no_grad():
                base.model.lm_head.weight.mul_(0.5)
        return base

    monkeypatch.setattr(saved, "read", moved)
    code, _, err = run("whole", "--to", tmp_path / "m")
    assert code == 5 and "the model as written is not the run whole" in err
    assert not (tmp_path / "m").exists()


def test_whole_model_has_no_adapter_to_export(stages, run, tmp_path, monkeypatch):
    monkeypatch.chdir(stages.parent.parent)
    code, _, err = run("whole", "--to", tmp_path / "m", "--form", "adapter")
    assert code == 2 and "--form must be merged, got adapter: whole trained its whole model and has none" in err
    code, _, err = run("judge", "--to", tmp_path / "m", "--form", "gguf")
    assert code == 2 and "judge is a reward model: --form merged" in err
    assert not (tmp_path / "m").exists()


def test_reward_model_that_prefers_otherwise_is_refused(stages, run, tmp_path, monkeypatch):
    """By its choices alone: the loss is let through, to see that they are compared."""
    monkeypatch.chdir(stages.parent.parent)
    plain = saved.read

    def turned(*args, **more):
        base = plain(*args, **more)
        with torch.no_grad():
            base.model.score.weight.neg_()
        return base

    monkeypatch.setattr(saved, "read", turned)
    loose = fidelity.Limit(float("inf"), 0.999)
    monkeypatch.setattr(fidelity, "LIMITS", dict.fromkeys(fidelity.LIMITS, loose))
    code, _, err = run("judge", "--to", tmp_path / "m", "--form", "merged")
    assert code == 5 and "the model as written is not the run judge" in err
    assert " 0.00 % of the choices equal" in err
    assert not (tmp_path / "m").exists()


def test_refusal_of_rounded_weights_names_the_format_that_does_not_round(stages, run, tmp_path, monkeypatch):
    monkeypatch.chdir(stages.parent.parent)
    plain, spoiled = saved.read, {"bfloat16"}

    def turned(folder, chosen, *args, **more):
        base = plain(folder, chosen, *args, **more)
        with torch.no_grad():
            base.model.score.weight.mul_(-1 if chosen.dtype in spoiled else 1)
        return base

    monkeypatch.setattr(saved, "read", turned)
    given = ("judge", "--to", tmp_path / "m", "--form", "merged", "--dtype")
    code, _, err = run(*given, "bfloat16")
    assert code == 5 and "removed; --dtype float32 does not round to bfloat16" in " ".join(err.split())
    assert run(*given, "float32")[0] == 0
    spoiled.add("float32")
    code, _, err = run("judge", "--to", tmp_path / "n", "--form", "merged")
    assert code == 5 and "--dtype" not in err

"""The page as a browser's parser sees it: the leaderboard's numbers, everything escaped, nothing from elsewhere."""

import dataclasses
import math
import re
from html.parser import HTMLParser

import pytest
from made import HOSTILE, confirmed, sweep

from ftexp import board as boards
from ftexp import compare, report
from ftexp.files import read_json, write_json
from ftexp.page import html, svg, text
from ftexp.stats import explain

VOID = {"meta", "input", "br", "img", "link", "path", "rect", "circle"}


class Seen(HTMLParser):
    """Elements and texts in their order; complains about tags that do not close."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.tables, self.texts = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.tables and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def seen(folder):
    return Seen(html.page(report.gather(folder)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweeps")
    made = {
        "three": sweep(place / "three"),
        "labels": sweep(place / "labels", kind="labels"),
        "loss": sweep(place / "loss", kind="loss", failed=1),
        "seeds": sweep(place / "seeds", 6, replicates=2),
        "none": sweep(place / "none", 2, failed=2),
        "hostile": confirmed(sweep(place / "hostile", 5, hostile=HOSTILE, pruned=1, failed=1), hostile=HOSTILE),
        "sealed": confirmed(sweep(place / "sealed", kind="labels", hostile=HOSTILE), labels=True, hostile=HOSTILE),
    }
    return made | {"run": made["three"] / "0"}


def leaderboard(found):
    return next(t for t in found.tables if t and t[0][1:3] == ["overrides", "rank"])


def test_leaderboard_holds_the_scores_of_the_files(folders):
    trials = [read_json(folders["three"] / str(n) / "trial.json") for n in range(3)]
    order = sorted(range(3), key=lambda n: trials[n]["scores"]["valid/loss"])
    head, base, *rows = leaderboard(seen(folders["three"]))
    assert head == ["trial", "overrides", "rank", "trainable", "loss", "perplexity", "exact match", "seconds", "GiB"]
    assert base[0] == "base" and base[4] == f"{trials[0]['scores']['base/loss']:.4f}"
    for n, row in zip(order, rows, strict=True):
        scores = trials[n]["scores"]
        assert row == [
            f"{n} best" if n == order[0] else str(n), trials[n]["label"], str(trials[n]["config"]["lora.r"]),
            f"{scores['cost/trainable'] / 1e6:.2f} M", f"{scores['valid/loss']:.4f}", f"{scores['valid/perplexity']:.3f}",
            f"{scores['valid/exact_match']:.3f}", f"{scores['cost/seconds']:.0f}", "2.0",
        ]  # fmt: skip


@pytest.mark.parametrize("name", ["three", "labels", "loss", "seeds", "run", "none"])
def test_page_and_terminal_show_one_leaderboard(name, folders):
    board = report.read(folders[name])
    assert leaderboard(seen(folders[name])) == [boards.titles(board), *(line.cells for line in boards.lines(board))]


def test_intervals_are_those_of_the_verdict(folders):
    verdict = report.gather(folders["three"]).verdict
    table = next(t for t in seen(folders["three"]).tables if t[0][0] == "point")
    told = {row[0]: row[1:4] for row in table[1:]}
    for n, point in enumerate(verdict.points):
        value, span, p = told[point.label]
        assert value == f"{point.score.value:.4f}" and span == f"{point.score.low:.4f} to {point.score.high:.4f}"
        assert p == ("best" if n == verdict.best else "<0.001" if point.p < 0.001 else f"{point.p:.2g}")
    values = [float(row[1]) for row in table[1:]]
    assert values == sorted(values)


def test_effects_are_means_over_the_points(folders):
    found = next(t for t in seen(folders["three"]).tables if t[0][0] == "value")
    trials = [read_json(folders["three"] / str(n) / "trial.json") for n in range(3)]
    for value, count, mean, *_ in found[1:]:
        scores = [t["scores"]["valid/loss"] for t in trials if str(t["config"]["lora.r"]) == value]
        assert (count, mean) == (str(len(scores)), f"{math.fsum(scores) / len(scores):.4f}")


def test_decision_card_tells_winner_rows_and_command(folders):
    page = html.page(report.gather(folders["three"]))
    board = report.read(folders["three"])
    best = board.points[board.best]
    assert f"<strong>{boards.label(best)}</strong>" in page
    assert "130 read = 100 train + 24 valid + 0 test + 6 dropped (6 copies)" in page
    assert "Every row is accounted for." in page
    command = re.search(r"<pre>(.*?)</pre>", page)[1]
    assert command.startswith("python -m ftexp.run lora.r=") and "name=" not in command and "trainer.lr=" in command


def test_rows_that_do_not_add_up_are_told(folders, tmp_path):
    folder = sweep(tmp_path / "leak")
    told = read_json(folder / "0" / "trial.json")
    told["facts"]["rows"]["read"] = 131
    write_json(folder / "0" / "trial.json", told | {"facts": told["facts"]})
    assert "This does not add up." in html.page(report.gather(folder))


@pytest.mark.parametrize("name", ["three", "labels", "loss", "seeds", "run", "none", "hostile", "sealed"])
def test_page_needs_nothing_from_elsewhere(name, folders):
    page = html.page(report.gather(folders[name]))
    found = Seen(page)
    assert not found.named("link") and not found.named("img") and not found.named("iframe")
    assert all(a["href"].startswith("#") for a in found.named("a"))
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in found.named("a")} <= set(ids)
    assert set(re.findall(r"https?://[^\"' <]*", page)) <= {"http://www.w3.org/2000/svg"}
    assert str(folders[name].parent) not in page


@pytest.mark.parametrize("name", ["three", "labels", "loss", "seeds", "run"])
def test_names_for_those_who_do_not_see_it(name, folders):
    found = seen(folders[name])
    assert found.named("html") == [{"lang": "en"}]
    assert all(s.get("aria-label") or s.get("aria-hidden") for s in found.named("svg"))
    assert all(r.get("aria-label") and r["tabindex"] == "0" for r in found.named("div") if r.get("role") == "region")
    assert all(th.get("scope") for th in found.named("th"))
    labelled = {label["for"] for label in found.named("label")}
    assert {i["id"] for i in found.named("input")} == labelled
    assert len(found.named("h1")) == 1


def hostile_marks(page):
    """What a browser would do with hostile text: elements and attributes that are not ours."""
    found = Seen(page)
    strange = [tag for tag, attrs in found.tags if tag in ("img", "b", "x") or any(a.startswith("on") for a in attrs)]
    return strange + ["script"] * (len(found.named("script")) - 1)


def test_hostile_text_stays_text(folders):
    page = html.page(report.gather(folders["hostile"]))
    assert hostile_marks(page) == []
    assert page.encode()  # half a surrogate is gone
    said = "".join(Seen(page).texts)
    assert said.count("<script>alert(1)</script>") > 30
    assert "\u202e" not in page
    assert hostile_marks(html.page(report.gather(folders["sealed"]))) == []


@pytest.mark.parametrize("module", [html, svg])
def test_hostile_text_is_caught_where_escaping_breaks(module, folders, monkeypatch):
    monkeypatch.setattr(module, "_e" if module is html else "escape", str)
    try:
        found = hostile_marks(html.page(report.gather(folders["hostile"])))
    except AssertionError:  # tags that do not close
        found = ["broken"]
    assert found


def test_page_without_a_result_says_so(folders):
    page = html.page(report.gather(folders["none"]))
    assert "No point is complete: there is nothing to choose from." in page and "failed at step 4" in page


def section(folder, key):
    page = html.page(report.gather(folder))
    found = re.search(rf'<section id="{key}".*?</section>', page, re.DOTALL)
    return None if found is None else Seen(found[0])


def test_plan_stands_beside_what_was_taken(folders):
    found = section(folders["three"], "plan")
    told = read_json(folders["three"] / "1" / "trial.json")
    row = next(r for r in found.tables[0] if r[0] == "1")
    rank = told["config"]["lora.r"]
    assert row[1:] == [told["label"], f"{rank * 10**5:,}", "10,000,000", "10", str(rank), "1.500", "2.000", "-25 %"]
    assert "of 3 of 3 trials are as planned." in " ".join(found.texts)


def test_a_plan_that_was_missed_is_told(tmp_path):
    folder = sweep(tmp_path / "s")
    told = read_json(folder / "2" / "trial.json")
    told["plan"]["steps"]["real"] = 9
    write_json(folder / "2" / "trial.json", told)
    found = section(folder, "plan")
    assert "of 2 of 3 trials are as planned; the others" in " ".join(found.texts)
    assert [r[4] for r in found.tables[0][1:]] == ["10", "10", "10 → 9"]


def test_sweeps_of_before_plans_have_no_such_section(tmp_path):
    folder = sweep(tmp_path / "s")
    for n in range(3):
        told = read_json(folder / str(n) / "trial.json")
        del told["plan"]
        write_json(folder / str(n) / "trial.json", told)
    assert section(folder, "plan") is None


def test_labels_of_the_winner_stand_on_the_page(folders):
    assert section(folders["three"], "labels") is None
    found = section(folders["labels"], "labels")
    (table,) = found.tables
    assert table[0] == [
        "label",
        "true",
        "predicted",
        "precision",
        "recall",
        "F1",
        "ROC-AUC",
        "threshold",
        "F1 of TF-IDF",
    ]
    assert table[1] == ["drama", "9", "4", "0.500", "0.500", "0.500", "0.750", "0.250", "0.400"]
    assert table[3][:2] == ["war", "0"] and table[3][5] == ""


def test_labels_of_opened_rows_stand_below_them(folders):
    _, table = section(folders["sealed"], "labels").tables
    assert table[1][3:6] == ["0.500", "0.600", "0.600"]  # means over the two seeds


def test_confirmation_is_on_page_card_and_terminal(tmp_path, capsys):
    folder = sweep(tmp_path / "s")
    best = report.read(folder).best
    assert section(folder, "confirmation") is None
    confirmed(folder, (best,))
    found = section(folder, "confirmation")
    label = read_json(folder / str(best) / "trial.json")["label"]
    assert found.tables[0][1] == [f"winner: {label}", "0.4198", "0.4242", "0.4321 (0.4000 to 0.4600)",
                                  "0.0123 (-0.0100 to 0.0400)", "2"]  # fmt: skip
    assert found.tables[1][1:] == [["test/loss", "0.4321 (0.4000 to 0.4600)"], ["test/memorised", "0.0000"]]
    assert "test/loss 0.4321 (0.4000 to 0.4600)" in " ".join(" ".join(section(folder, "decision").texts).split())
    report.show(folder, page=False)
    out = " ".join(capsys.readouterr().out.split())
    assert "looked 0.0123 (-0.0100 to 0.0400) better in the sweep" in out and "Confirmed was" not in out
    confirmed(folder, ((best + 1) % 3,))
    report.show(folder, page=False)
    assert f"first now is {label}" in " ".join(capsys.readouterr().out.split())
    assert report.data(report.gather(folder))["confirmed"][0]["result"]["rows"] == 24


def test_sealed_rows_that_were_not_opened_say_how(tmp_path):
    folder = sweep(tmp_path / "s")
    assert "Not opened." not in html.page(report.gather(folder))
    told = read_json(folder / "0" / "trial.json")
    told["facts"]["rows"] |= {"test": 24, "train": 76}
    write_json(folder / "0" / "trial.json", told)
    assert "Not opened. <code>ftexp confirm s</code>" in html.page(report.gather(folder))
    assert "Not opened. <code>ftexp confirm s --by valid/perplexity</code>" in html.page(
        report.gather(folder, "valid/perplexity")
    )
    assert "Not opened.</dd>" in html.page(report.gather(folder, "cost/seconds"))


def test_examples_count_wins_and_losses(folders):
    found = seen(folders["three"])
    kinds = [a["class"] for a in found.named("li") if a.get("class") in ("win", "loss", "same")]
    assert len(kinds) == 24
    text = " ".join(found.texts)
    assert f"{kinds.count('win')} better, {kinds.count('loss')} worse, {kinds.count('same')} the same" in text
    assert kinds.count("win") and kinds.count("loss")


def test_equal_sweeps_give_equal_pages(folders):
    one = report.gather(folders["three"])
    assert html.page(one) == html.page(dataclasses.replace(one))


def test_two_hundred_trials_are_one_page_of_modest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "MOST_POINTS", 12)
    monkeypatch.setattr(explain, "RESAMPLES", 2)
    monkeypatch.setattr(compare.explain, "importance", lambda *a: {})
    sweep(tmp_path / "s", 200, pruned=90, failed=6)
    page = html.page(report.gather(tmp_path / "s"))
    assert len(page) < 400_000
    assert page.count('class="run pruned"') == 91 and page.count('class="sign failed"') == 7  # with the key's
    assert len(leaderboard(Seen(page))) == 202


def test_text_of_a_page_has_one_door():
    assert html._e is text.escape and svg.escape is text.escape


@pytest.mark.parametrize(("kind", "told"), [
    ("sft", "nats a token"), ("classify", "nats a decision"), ("reward", "nats a pair"), ("dpo", "nats a pair"),
])  # fmt: skip
def test_header_names_the_unit_of_the_method(tmp_path, kind, told):
    folder = sweep(tmp_path / "s")
    for path in folder.glob("*/trial.json"):
        trial = read_json(path)
        write_json(path, trial | {"config": trial["config"] | {"trainer.kind": kind}})
    assert f"Ranked by valid/loss ({told}; lower is better)." in html.page(report.gather(folder))

"""Lines of the leaderboard; `test_report` and `page/test_html` read them as people do."""

from made import sweep

from ftexp import board
from ftexp.board import Line


def test_a_line_has_a_cell_for_each_title(tmp_path):
    found = board.read(sweep(tmp_path / "s", 6, replicates=2, failed=1))
    lines = board.lines(found)
    assert {len(line.cells) for line in lines} == {len(board.titles(found))}
    assert [line.kind for line in lines] == ["base", "best", "complete", "unfinished"]
    assert "between seeds" in board.titles(found)
    assert isinstance(lines[0], Line) and lines[-1].cells[2] == "1 complete, 1 failed"


def test_point_of_its_trials(tmp_path):
    found = board.read(sweep(tmp_path / "s", 6, replicates=2))
    assert board.point_of(found, (2, 3)) is found.points[1]

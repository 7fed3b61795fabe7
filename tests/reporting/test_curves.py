"""Curves of a log: what is in it is drawn, and nothing that anybody wrote into it becomes markup."""

import json
import xml.etree.ElementTree as ElementTree

from caption_train.reporting.curves import MOST_POINTS, draw_chart, make_charts, read_charts
from caption_train.reporting.report import Chart, Series

SVG = "{http://www.w3.org/2000/svg}"


def parse(chart):
    return ElementTree.fromstring(
        draw_chart(chart).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    )


def test_losses_metrics_and_learning_rate_have_charts(tmp_path):
    lines = [{"step": step, "loss": 1 / step, "learning_rate": 0.1} for step in range(1, 9)]
    lines += [{"step": 8, "eval_loss": 0.5, "eval_cider": 0.1}, {"step": 9, "loss": None}]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '\nnot json\n[1]\n{"step": "x", "loss": 1}\n{"step": 9, "lo')
    charts = read_charts(tmp_path)
    assert [chart.title for chart in charts] == ["Loss per token", "Validation metrics", "Learning rate"]
    assert [series.label for series in charts[0].series] == ["each step", "running mean", "validation"]
    assert charts[0].series[0].points[:2] == [(1, 1), (2, 0.5)]
    assert charts[1].series == [Series("cider", [(8, 0.1)])]


def test_without_a_log_there_are_no_charts(tmp_path):
    assert read_charts(tmp_path) == []
    (tmp_path / "log.jsonl").mkdir()
    assert read_charts(tmp_path) == []


def test_points_stand_where_they_belong():
    lines = parse(Chart("a", [Series("x", [(0, 0.0), (50, 5.0), (100, 10.0)])])).findall(f"{SVG}polyline")
    points = [tuple(map(float, point.split(","))) for point in lines[0].get("points").split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == x2 - x1 > 0 and y0 - y1 == y1 - y2 > 0


def test_a_long_run_is_thinned():
    charts = make_charts({"step": step, "loss": float(step % 2)} for step in range(100_000))
    points = charts[0].series[0].points
    assert len(points) <= MOST_POINTS and all(abs(y - 0.5) < 0.01 for _, y in points)


def test_one_point_and_equal_values_can_be_drawn():
    for points in [(1, 0.0)], [(1, 2.0), (2, 2.0)], [(1, 1e-12), (2, 1e12)]:
        parse(Chart("a", [Series("x", points)]))


def test_names_in_a_log_are_escaped():
    charts = make_charts([{"step": 1, "eval_<script>alert(1)</script>": 1.0, "eval_\"' onload=x": 2.0}])
    svg = draw_chart(charts[0])
    assert "<script" not in svg
    assert parse(charts[0]).keys() == ["viewBox", "role", "aria-label"]

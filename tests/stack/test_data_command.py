"""Guards that `launch.data` reads on several processes as it would on one: in order, errors with their reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import data
from tests.builders import noise, png


def test_processes_read_in_order_and_send_faults_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(png(noise(0, 20, 30)))
    lines = [{"image": "a.png", "question": str(number), "boxes": []} for number in range(3 * data.CHUNK)]
    for number in (700, 3, 300):
        lines[number]["image"] = f"{number}.png"
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(SystemExit, match="2"):
        data.main(["check", "data.format=jsonl", f"data.train={path}"])
    title, *told = capsys.readouterr().out.splitlines()
    assert title == "train: 3 of 768 questions cannot be used (image 3)"
    assert [line.split(":")[1] for line in told] == [" line 4", " line 301", " line 701"]

"""README tables come from committed results."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from running import bench_script

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def module():
    return bench_script("publish")


@pytest.fixture(scope="module")
def publish(module):
    return module.publish


def test_readme_is_what_publish_writes(publish) -> None:
    publish(ROOT / "README.md", check=True)


def test_an_edited_figure_is_noticed_and_mended(publish, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", readme)
    text = readme.read_text()
    readme.write_text(text.replace("| memory tree |", "| memory bush |", 1))
    assert readme.read_text() != text
    with pytest.raises(ValueError, match="is not what"):
        publish(readme, check=True)
    publish(readme, check=False)
    assert readme.read_text() == text


def test_markers_must_be_there(publish, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="must hold the markers"):
        publish(readme, check=False)


def test_the_plots_are_those_of_the_results(module, tmp_path: Path) -> None:
    module.draw(module.IMAGES, check=True)
    module.draw(tmp_path, check=False)
    module.draw(tmp_path, check=True)
    shutil.copy(tmp_path / "timeline.png", tmp_path / "speedups.png")
    with pytest.raises(ValueError, match=r"speedups\.png is not what"):
        module.draw(tmp_path, check=True)

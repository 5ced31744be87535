import base64
import re
import sys
import types

import pytest

from deepseek_jax.notebook_console import NotebookConsole, in_notebook


@pytest.fixture
def shown(monkeypatch):
  """What a display of IPython showed, in order."""
  pages = []

  class Handle:
    def update(self, content):
      pages.append(content)

  def display(content, display_id):
    pages.append(content)
    return Handle()

  module = types.ModuleType("IPython.display")
  module.HTML, module.display = str, display
  monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
  monkeypatch.setitem(sys.modules, "IPython.display", module)
  return pages


def test_the_last_step_and_the_curves_are_shown_when_the_run_ends(shown):
  console = NotebookConsole()
  writer = console.metrics_writer("folder", 0)
  with console.step_progress(0, 1200) as update:
    assert "compiling" in shown[0] and "<img" not in shown[0]
    writer.write(1, {"bits_per_byte": 8.0}, {})
    writer.write(2, {"bits_per_byte": float("nan")}, {})
    writer.event("eval", 2, bits_per_byte=7.5)
    writer.event("start", 2)
    update(1100, "loss <5>")
  writer.event("eval", 1100, bits_per_byte=4.5)
  writer.close()
  assert 'value="1100" max="1200"' in shown[-1] and "step 1,100 of 1,200" in shown[-1] and "loss &lt;5&gt;" in shown[-1]
  image = base64.b64decode(re.search(r"base64,([^\"]+)", shown[-1])[1]).decode()
  assert image.startswith('<svg xmlns="http://www.w3.org/2000/svg" ') and image.count("<circle") == 3
  assert image.count('class="nonfinite"') == 1


def test_a_display_is_not_redrawn_at_every_step(shown):
  with NotebookConsole().step_progress(0, 500) as update:
    for step in range(500):
      update(step, "")
  assert len(shown) < 10


def test_only_a_kernel_is_a_notebook(monkeypatch):
  assert not in_notebook()
  ipython = types.ModuleType("IPython")
  monkeypatch.setitem(sys.modules, "IPython", ipython)
  for shell, expected in ((None, False), (object(), False), (types.SimpleNamespace(kernel=object()), True)):
    ipython.get_ipython = lambda shell=shell: shell
    assert in_notebook() == expected

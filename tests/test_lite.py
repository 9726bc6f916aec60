import subprocess
import sys

import pytest
import torch

from headstart import backbones, lite, zoo


@pytest.mark.parametrize("name", zoo.PACKAGED)
@pytest.mark.parametrize("size", [224, 97])
def test_the_network_is_timms_bit_for_bit(name, size):
    timm = pytest.importorskip("timm")
    located = backbones.locate(name)
    state = backbones.load(located).state
    theirs = timm.create_model(located.spec.architecture, num_classes=0).eval()
    theirs.load_state_dict(dict(state))
    ours = lite.build(state).eval()
    assert set(ours.state_dict()) == set(theirs.state_dict())
    pictures = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(ours(pictures), theirs(pictures))


def test_the_default_network_needs_neither_timm_nor_torchvision(shapes, tmp_path):
    code = (
        "import sys, headstart\n"
        "headstart.train(sys.argv[1], sys.argv[2])\n"
        "list(headstart.predict(sys.argv[2], sys.argv[1]))\n"
        "sys.exit(bool({'timm', 'torchvision', 'torch._dynamo', 'sklearn'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", code, str(shapes), str(tmp_path / "run")]
    assert subprocess.run(words, check=False).returncode == 0

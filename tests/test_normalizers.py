"""--normalize: the whole training against the definitions in float64, cut batches and all."""

import numpy as np
import pytest

from prift.errors import OptionError
from prift.methods import METHODS, weigher
from prift.training_data import TrainOptions, load_data
from prift.weighing import DENOMINATORS, NORMALIZERS
from tests import cutting
from tests.lab import Lab
from tests.test_cutting import assert_equal, two_ranks


def test_denominators_by_hand():
    weights = np.array([0.5, 0.0, -2.0], np.float32)
    found = {name: DENOMINATORS[name](weights) for name in NORMALIZERS}
    assert found == {"tokens": 3, "kept": 2, "weights": 2.5, "sequence": 1}


@pytest.mark.parametrize("method", ["prift-prob", "prift-mass"])
@pytest.mark.parametrize("normalize", ["kept", "weights", "sequence"])
def test_training_divides_by_what_was_asked_for(tmp_path, method, normalize):
    """Over two micro-batches, one of which has nothing to run."""
    ours = cutting.run(tmp_path, method, 2, normalize=normalize)
    assert_equal(ours, method, 2, normalize=normalize)


@pytest.mark.parametrize("method", ["sft", "dft"])
def test_a_mean_over_sequences_needs_no_weights_beforehand(tmp_path, method):
    ours = cutting.run(tmp_path, method, 2, normalize="sequence")
    assert_equal(ours, method, 2, normalize="sequence")


@pytest.mark.parametrize("normalize", [pytest.param("kept", marks=pytest.mark.slow), "weights"])
def test_two_ranks_divide_by_what_both_have(tmp_path, normalize):
    ours = two_ranks(tmp_path, "prift-prob", 1, normalize)
    assert_equal(ours, "prift-prob", 2, ranks=2, normalize=normalize)


@pytest.mark.parametrize("normalize", ["kept", "weights"])
def test_online_weights_come_too_late(tmp_path, normalize):
    lab = Lab(tmp_path)
    chosen = weigher(*METHODS["dft"], {})
    options = TrainOptions(lab.model, "out", lab.spec(), chosen, normalize=normalize)
    with pytest.raises(OptionError, match=f"--normalize {normalize} .* --source prior"):
        load_data(options, None, None, print)

#!/bin/sh
# How large a difference do two paired runs find nine times in ten? Guess: statsmodels' solver, 14.8 standard deviations, as
# the integral says. Seen with statsmodels 0.15.0 and SciPy 1.17.1: the solver returns 10.00001 and reports that it converged;
# the power there is 0.73. It evaluates SciPy's noncentral t distribution, whose lower tail is NaN for some large shifts (here at a
# difference of 20). The square of the statistic is noncentral F, which SciPy evaluates correctly there.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 scipy==1.17.1 statsmodels==0.15.0
"$folder/env/bin/python" - <<'PY'
import math
import warnings

from scipy import integrate, stats
from statsmodels.stats.power import TTestPower

warnings.simplefilter("ignore")
n, alpha, wanted = 2, 0.05, 0.9
edge = stats.t.ppf(1 - alpha / 2, n - 1)


def integral(d):  # over the chi distribution of the sample deviation
    shift = d * math.sqrt(n)
    f = lambda u: stats.chi(1).pdf(u) * (stats.norm.sf(edge * u - shift) + stats.norm.cdf(-edge * u - shift))
    return integrate.quad(f, 0, math.inf, limit=200)[0]


solver = TTestPower()
found = solver.solve_power(nobs=n, alpha=alpha, power=wanted)
print("solve_power:", found, "power there:", solver.power(found, n, alpha), "integral:", integral(found))
assert abs(found - 10.00001) < 1e-4 and abs(integral(found) - 0.733) < 1e-3
assert abs(integral(14.816) - wanted) < 1e-3
tail = stats.nct.cdf(-edge, n - 1, 20 * math.sqrt(n))
by_f = stats.ncf.sf(edge**2, 1, n - 1, n * 20**2)
print("integral at 20:", integral(20), "nct.cdf of the other tail:", tail, "ncf.sf:", by_f)
assert math.isnan(tail) and abs(by_f - integral(20)) < 1e-4
PY

"""An n-gram model of token ids, to set a language model against: Kneser-Ney, modified and interpolated.

    p_n(w | h) = max(c(hw) - D, 0) / c(h) + g(h) p_{n-1}(w | h')        D one of three, by c(hw) = 1, 2, 3 or more

(Chen and Goodman 1999, https://doi.org/10.1006/csla.1999.0128, section 3.) c counts occurrences for the longest grams,
and for shorter ones the different tokens that were met in front of them. An n-gram is one integer: BITS for each token.
"""

import numpy as np

BITS = 12  # of a token: 4,096 of them, and grams of five


class Order:
    """The grams of one length, with their counts and the discounts that follow from these."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray):
        """grams: (G,) int64, ascending and different. counts: (G,) int64."""
        self.grams = grams
        self.counts = counts
        ones, twos, threes, fours = (max(1, int((counts == n).sum())) for n in (1, 2, 3, 4))
        y = ones / (ones + 2 * twos)
        self.discounts = np.array([0, 1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes])
        histories = grams >> BITS
        self.histories, begins = np.unique(histories, return_index=True)
        self.totals = np.add.reduceat(counts, begins)  # (H,)
        self.left = np.add.reduceat(self.discounts[np.minimum(counts, 3)], begins)  # (H,) what the discounts set free

    def probabilities(self, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """p(last token | those before) of each gram, (n,), from `lower`, the same of grams that are one shorter."""
        counts = found(self.grams, self.counts, grams)
        totals = found(self.histories, self.totals, grams >> BITS)
        left = found(self.histories, self.left, grams >> BITS)
        known = np.maximum(totals, 1)
        p = (counts - self.discounts[np.minimum(counts, 3)]) / known + left / known * lower
        return np.where(totals > 0, p, lower)


def found(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of some keys, 0 where there is none. keys: ascending."""
    places = np.minimum(keys.searchsorted(wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], values.dtype.type(0))


def windows(tokens: np.ndarray, n: int) -> np.ndarray:
    """Every n-gram of a stream of tokens, (len - n + 1,) int64."""
    grams = np.zeros(len(tokens) - n + 1, np.int64)
    for i in range(n):
        grams = grams << BITS | tokens[i : len(tokens) - n + 1 + i]
    return grams


def kneser_ney(tokens: np.ndarray, n: int) -> list[Order]:
    """The orders of the model, from 1 to n. tokens: the text to learn from, int64 ids below 2^BITS."""
    grams, counts = np.unique(windows(tokens, n), return_counts=True)
    orders = [Order(grams, counts)]
    for length in range(n - 1, 0, -1):
        inside = grams & (1 << BITS * length) - 1  # without the first token
        grams, counts = np.unique(inside, return_counts=True)
        orders.append(Order(grams, counts))
    return orders[::-1]


def perplexity(orders: list[Order], tokens: np.ndarray) -> float:
    """Of a text's tokens, each after as many as the model looks back at; the first ones are only looked at."""
    n = len(orders)
    grams = windows(tokens, n)
    p = np.full(len(grams), 2.0**-BITS)
    for length, order in enumerate(orders, 1):
        p = order.probabilities(grams & (1 << BITS * length) - 1, p)
    return float(np.exp(-np.log(p).mean()))

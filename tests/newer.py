"""The newer losses of the logits, with the options that the tests give them."""

from functools import partial

from sddlskd.losses import abkd, dist, gdkd, rld, skd, sld, ttm, wttm

# Losses of single samples.
SINGLE = {
    "ttm": partial(ttm, gamma=0.1),
    "wttm": partial(wttm, gamma=0.1),
    "rld": partial(rld, alpha=1.0, beta=8.0, temperature=4.0),
    "gdkd": partial(gdkd, k=1, w0=1.0, w1=2.0, w2=8.0, temperature=4.0),
    "abkd": partial(abkd, alpha=0.8, beta=0.3, temperature=4.0),
    "sld": partial(sld, temperatures=[1.0, 2.0, 4.0]),
}
# Losses that compare the images of a batch.
COMPARING = {
    "dist": partial(dist, beta=2.0, gamma=3.0, temperature=4.0),
    "skd": partial(skd, temperature=4.0, ridge=0.1),
}
NEWER = {**SINGLE, **COMPARING}

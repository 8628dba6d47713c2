"""Knowledge distillation with scale-decoupled (SDD) and standardised logits (LSKD).

The package trains students from Hydra configurations, one by one or in sweeps, and keeps a record
of each run.
"""

"""Knowledge distillation by scale (SDD) with standardised logits (LSKD).

One command leads from a configuration to the paper's table.
"""

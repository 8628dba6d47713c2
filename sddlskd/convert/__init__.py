"""Translate configuration files of other distillation codes into commands of this package.

    python -m sddlskd.convert FILE [FLAGS] [KEY VALUE ...]    print the command for a file

`mdistiller` reads the files of mdistiller, SDD and LSKD, which have the same keys, and
`torchdistill` those of torchdistill. Both make a `Translation`, which `command` turns into text.
"""

"""Translate configuration files of other distillation codes into commands of this package.

    python -m sddlskd.convert FILE [FLAGS] [KEY VALUE ...]    print the command for a file

The module `mdistiller` reads the files of mdistiller, SDD and LSKD, which have the same keys. The
module `torchdistill` reads the files of torchdistill. Both return a `Translation`, which the
function `command` of the module `translation` turns into the text of a command.
"""

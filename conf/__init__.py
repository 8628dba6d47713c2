"""The configuration files, installed as the package `sddlskd.conf`."""

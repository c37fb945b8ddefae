"""Measurements that users do not run; not shipped."""

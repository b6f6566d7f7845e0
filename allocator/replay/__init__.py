"""Replays request traffic through a heap and checks every byte."""

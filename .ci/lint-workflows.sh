#!/usr/bin/env bash
# Lints what is neither Python nor prose: workflows, the action, Dependabot's settings, the Dockerfile, shell scripts.
# The tools are those of requirements/e2e-tools.txt, and shellcheck; all work without a network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

recipes=(recipes/comment.yml recipes/hub-push.yml recipes/publish.yml)
mapfile -t standins < <(find tests/e2e -path '*-standin/*' -name action.yml)
workflows=(.github/workflows/*.yml tests/e2e/workflows/*.yml "${recipes[@]}")
zizmor --offline --no-progress --quiet --strict-collection --persona=auditor .github action.yml "${recipes[@]}"
zizmor --offline --no-progress --quiet --strict-collection tests/e2e/workflows "${standins[@]}"
actionlint -no-color -config-file .github/actionlint.yaml "${workflows[@]}"
check-jsonschema --builtin-schema vendor.github-actions action.yml "${standins[@]}"
check-jsonschema --builtin-schema vendor.github-workflows "${workflows[@]}"
check-jsonschema --builtin-schema vendor.gitlab-ci recipes/gitlab.yml
check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*_*.yml
check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
hadolint --config .hadolint.yaml Dockerfile
shellcheck .ci/*.sh

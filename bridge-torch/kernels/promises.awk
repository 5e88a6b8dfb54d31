# First file: a kernel's source, second: its machine code. Every promised instruction must stand in every function whose name
# holds the kernel's, for the named architecture or for all.
FNR == NR {
  if ($1 == "//" && $2 == "sass") {
    split($0, part, ": ")
    words = split(part[1], head, " ")
    count = split(part[2], wanted, " ")
    for (i = 1; i <= count; ++i) {
      promises++
      kernel[promises] = head[3]
      on[promises] = words > 3 ? head[4] : ""
      instruction[promises] = wanted[i]
    }
  }
  next
}
function settle(   i) {
  for (i = 1; i <= promises; ++i) {
    if (name != "" && index(name, kernel[i]) && (on[i] == "" || on[i] == arch)) {
      seen[i]++
      if (!index(code, " " instruction[i])) {
        print source ": " name " for " arch " has no " instruction[i] > "/dev/stderr"
        wrong = 1
      }
    }
  }
  name = code = ""
}
/^arch = / { settle(); arch = $3 }
/Function : / { settle(); name = $3 }
/^ *\/\*[0-9a-f]+\*\// { code = code " " $2 " " $3 }
END {
  settle()
  for (i = 1; i <= promises; ++i) {
    if (!seen[i]) {
      print source ": promises " instruction[i] " in " kernel[i] ", which is no kernel of it" > "/dev/stderr"
      wrong = 1
    }
  }
  exit wrong
}

package phd

// #include "shim.h"
// #cgo noescape phd_version
// #cgo nocallback phd_version
// #cgo noescape phd_abi_version
// #cgo nocallback phd_abi_version
import "C"

// Version returns the library's version, such as "0.1.0".
func Version() string { return C.GoString(C.phd_version()) }

// ABIVersion returns a number that grows when the library's binary interface breaks.
func ABIVersion() uint32 { return uint32(C.phd_abi_version()) }
